"""Reads a Dockerfile and a .dockerignore: instructions, stages, and the files sent as context.

Knows what our Dockerfile uses, and raises DockerfileError for the rest, so that nothing is passed
over in silence. `run_dockerfile` runs what this reads; the tests in tests/deploy judge it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN",
    "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class DockerfileError(Exception):
    """What cannot be read, with its line."""


@dataclass(frozen=True)
class Instruction:
    line: int
    name: str
    flags: dict[str, str]
    value: str

    @property
    def words(self) -> list[str]:
        """The arguments: of the JSON form, or split as a shell would."""
        if self.value.startswith("["):
            words: list[str] = json.loads(self.value)
            return words
        return shlex.split(self.value)

    @property
    def pairs(self) -> dict[str, str]:
        """Of ENV, LABEL, ARG: name -> value."""
        return {word.partition("=")[0]: word.partition("=")[2] for word in self.words}


@dataclass
class Stage:
    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, name: str) -> Instruction | None:
        """The one that counts, where an instruction may be given again."""
        found = [each for each in self.instructions if each.name == name]
        return found[-1] if found else None


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile. Raises DockerfileError."""
    stages: list[Stage] = []
    for line, logical in _logical_lines(text):
        name, _, rest = logical.partition(" ")
        name = name.upper()
        if name not in KNOWN:
            raise DockerfileError(f"line {line}: {name} is not known here")
        flags, rest = _flags(rest.strip())
        instruction = Instruction(line, name, flags, rest)
        if name == "FROM":
            words = rest.split()
            named = len(words) == 3 and words[1].upper() == "AS"
            if not named and len(words) != 1:
                raise DockerfileError(f"line {line}: FROM {rest} is not understood")
            stages.append(Stage(words[0], words[2] if named else str(len(stages))))
        elif not stages:
            raise DockerfileError(f"line {line}: {name} comes before FROM")
        else:
            stages[-1].instructions.append(instruction)
    if not stages:
        raise DockerfileError("there is no FROM")
    return stages


def whole(stages: list[Stage]) -> Stage:
    """The last stage with what it inherits from the stages that it is built on."""
    by_name = {stage.name: stage for stage in stages}
    chain = [stages[-1]]
    while chain[0].base in by_name:
        chain.insert(0, by_name[chain[0].base])
    instructions = [each for stage in chain for each in stage.instructions]
    return Stage(chain[0].base, stages[-1].name, instructions)


def substitute(value: str, variables: dict[str, str]) -> str:
    """$NAME and ${NAME}; unknown ones become empty, as Docker has it."""
    return VARIABLE.sub(lambda found: variables.get(found[1] or found[2], ""), value)


def health_command(instruction: Instruction) -> list[str]:
    """What HEALTHCHECK runs. Raises DockerfileError."""
    name, _, rest = instruction.value.partition(" ")
    if name != "CMD":
        raise DockerfileError(f"line {instruction.line}: HEALTHCHECK {name} checks nothing")
    rest = rest.strip()
    if rest.startswith("["):
        words: list[str] = json.loads(rest)
        return words
    return ["/bin/sh", "-c", rest]


def context_files(root: Path, ignore: str) -> list[Path]:
    """The files below `root` that are sent to the builder, relative. The last line of `ignore` that
    matches a file or a folder above it decides, and `!` takes it back in.
    """
    rules = []
    for line in ignore.splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            rules.append((not text.startswith("!"), _expression(text.lstrip("!").strip("/"))))
    wanted = [text.strip()[1:].strip("/") for text in ignore.splitlines() if text.startswith("!")]
    found = []
    for folder, names, files in os.walk(root):
        here = Path(folder).relative_to(root)
        # What nothing takes back in need not be entered: environments and models are large.
        names[:] = [
            name for name in names
            if not _ignored(here / name, rules)
            or any(f"{each}/".startswith(f"{here / name}/") for each in wanted)
        ]  # fmt: skip
        found += [here / name for name in files if not _ignored(here / name, rules)]
    return sorted(found)


def _ignored(path: Path, rules: list[tuple[bool, re.Pattern[str]]]) -> bool:
    names = [str(path), *(str(parent) for parent in path.parents if parent != Path())]
    ignored = False
    for ignores, expression in rules:
        if any(expression.fullmatch(name) for name in names):
            ignored = ignores
    return ignored


def _expression(pattern: str) -> re.Pattern[str]:
    """Go's filepath.Match, and `**` for any number of folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))


def _logical_lines(text: str) -> list[tuple[int, str]]:
    """(number of the first line, text) with continuations joined and comments left out."""
    found: list[tuple[int, str]] = []
    parts: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        first = first if parts else number
        parts.append(stripped.removesuffix("\\").strip())
        if not stripped.endswith("\\"):
            found.append((first, " ".join(parts)))
            parts = []
    if parts:
        raise DockerfileError(f"line {first}: nothing comes after the last backslash")
    return found


def _flags(rest: str) -> tuple[dict[str, str], str]:
    """Leading --name=value, and what follows them."""
    flags: dict[str, str] = {}
    while found := re.match(r"--([\w-]+)=(\S+)\s+", rest):
        flags[found[1]] = found[2]
        rest = rest[found.end() :]
    return flags, rest
