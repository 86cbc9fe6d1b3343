"""Does a patch still fit the installed vLLM? Answered from source text alone: nothing of vLLM is
imported, so the question can be asked before the import, and of an unpacked wheel of any version.

A patch declares in `APPLIES_TO` what it replaces or relies on: by module, the name in it (`Class`,
`Class.method`, `function`, `CONSTANT`, or "" for the module itself) and what is expected of it, in
one of three forms.

- "sha256:0123456789abcdef": the source of the function, class or constant is this. For what the
  patch replaces, or whose behaviour it depends on. The hash is of the code: comments, docstrings
  and blank lines are left out. Its first 16 digits are written.
- "call(a, b, *, c)": a function takes this call, with arguments in this order. For what the patch
  calls. Parameters may be added as long as they have defaults.
- "names: a b": the code mentions these names. For attributes that the patch reads or sets.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

AppliesTo = Mapping[str, Mapping[str, str]]

HASH_DIGITS = 16
DECLARED = ("NAME", "KIND", "APPLIES_TO", "WITHOUT")
_TRAILING_COMMENT = re.compile(r"\s+#[^'\"]*$")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class NotFound(Exception):
    """The source has no such name. The message is a reason for `reason`."""


def reason(applies_to: AppliesTo, root: Path | None = None) -> str | None:
    """None when all expectations of a patch hold, else the first that does not, as a sentence
    without a full stop. `root` as in `mismatches`.
    """
    return next(mismatches(applies_to, root), None)


def mismatches(applies_to: AppliesTo, root: Path | None = None) -> Iterator[str]:
    """All expectations that do not hold.

    `root` is a folder with `vllm/` in it, an unpacked wheel for instance; None: the installed one.
    Packages that the folder lacks (torch) are read where they are installed.
    """
    for module, members in applies_to.items():
        for member, expected in members.items():
            try:
                source = source_of(module, member, root)
            except NotFound as error:
                yield str(error)
                continue
            name = f"{module}.{member}" if member else module
            if (found := _mismatch(name, source, expected)) is not None:
                yield found


def digest(source: str) -> str:
    """The hash of a piece of source as APPLIES_TO has it, without its prefix."""
    return hashlib.sha256(_code(source).encode()).hexdigest()[:HASH_DIGITS]


def source_of(module: str, member: str, root: Path | None = None) -> str:
    """The source of a member (`Class.method`, or less deep; "": all) of a module, dedented. Raises
    NotFound.
    """
    source = _text(module, root)
    for depth, name in enumerate(member.split(".") if member else ()):
        block = _last_block(source, name, depth * 4)
        if block is None:
            raise NotFound(f"{module}.{member} is not there any more")
        source = block
    return textwrap.dedent(source)


def declaration_of(path: Path) -> dict[str, object]:
    """The constants of a patch, read from its file: importing it would import vLLM, which may lack
    what the patch's classes derive from.
    """
    found: dict[str, object] = {}
    head = path.read_text(encoding="utf-8").partition("\n\n\n")[0]  # above all functions
    for node in ast.parse(head).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in DECLARED:
                found[name] = ast.literal_eval(node.value)
    return found


def _mismatch(name: str, source: str, expected: str) -> str | None:
    if expected.startswith("sha256:"):
        found = digest(source)
        if found != expected.removeprefix("sha256:"):
            return f"the source of {name} has changed (sha256:{found})"
        return None
    if expected.startswith("call("):
        return _refused_call(name, source, expected)
    for word in expected.removeprefix("names:").split():
        if re.search(rf"^[^#\n]*\b{re.escape(word)}\b", source, re.MULTILINE) is None:
            return f"{name} does not mention {word} any more"
    return None


def _refused_call(name: str, source: str, call: str) -> str | None:
    """Why the function does not take the call, or None."""
    function = _function(source)
    if function is None:
        return f"{name} is not a function any more"
    asked = _function(f"def {call}: ...")
    assert asked is not None
    by_position = [each.arg for each in (*asked.args.posonlyargs, *asked.args.args)]
    by_keyword = {each.arg for each in asked.args.kwonlyargs}
    given = function.args
    positional = [each.arg for each in (*given.posonlyargs, *given.args)]
    if positional[:1] in (["self"], ["cls"]):
        positional = positional[1:]
    keywords = {each.arg for each in given.kwonlyargs} | set(positional)
    if positional[: len(by_position)] != by_position:
        return f"the signature of {name} has changed ({', '.join(positional)})"
    if (missing := sorted(by_keyword - keywords)) and given.kwarg is None:
        return f"{name} does not take {missing[0]} any more"
    with_default = set(positional[len(positional) - len(given.defaults) :])
    with_default |= {
        each.arg
        for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
        if default is not None
    }
    if needed := sorted(keywords - with_default - set(by_position) - by_keyword):
        return f"{name} wants {needed[0]}, which it did not"
    return None


@cache
def _text(module: str, root: Path | None) -> str:
    """The source of a module. Raises NotFound."""
    parts = module.split(".")
    folder = root if root is not None and (root / parts[0]).is_dir() else _installed(parts[0])
    place = folder.joinpath(*parts)
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return "\n" + path.read_text(encoding="utf-8")  # see `_last_block`
    raise NotFound(f"{module} is not there any more")


@cache
def _installed(package: str) -> Path:
    """The folder that contains the package, which is not imported. Raises NotFound."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise NotFound(f"{package} is not installed")
    return Path(found.submodule_search_locations[0]).parent


def _last_block(source: str, name: str, indent: int) -> str | None:
    """The last definition of the name at this indentation: earlier ones are its overloads."""
    begins = (
        f"def {name}(", f"async def {name}(", f"class {name}(", f"class {name}:", f"{name}:",
        f"{name} =",
    )  # fmt: skip
    # With the end of the line before, so that it is the whole indentation.
    found = max(source.rfind("\n" + " " * indent + begin) for begin in begins)
    if found < 0:
        return None
    start = found + 1
    decorator = " " * indent + "@"
    while source.startswith(decorator, above := source.rfind("\n", 0, start - 1) + 1):
        start = above
    # To the next line that is indented no deeper; brackets close what is above them.
    ends = re.compile(rf"\n {{0,{indent}}}[^\s)\]}}#]")
    end = ends.search(source, source.index("\n", found + 1))
    return source[start : end.start() if end else len(source)]


def _code(source: str) -> str:
    """Without comments, docstrings and blank lines. By line, so that it is the same whatever Python
    reads it, and takes no time.
    """
    kept: list[str] = []
    in_docstring = False
    for line in source.splitlines():
        bare = line.strip()
        if in_docstring:
            in_docstring = not bare.endswith('"""')
        elif bare.startswith('"""') and kept and kept[-1].endswith(":"):
            in_docstring = bare == '"""' or not bare.endswith('"""')
        elif bare and bare[0] != "#":
            kept.append((_TRAILING_COMMENT.sub("", line) if "#" in line else line).rstrip())
    return "\n".join(kept)


def _function(source: str) -> Function | None:
    (node,) = ast.parse(source).body[:1] or (None,)
    return node if isinstance(node, Function) else None
