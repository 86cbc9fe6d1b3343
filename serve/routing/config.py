"""The routes file: the operator's rules, default and thresholds.

Parsed at the start and at each reload. An error is Invalid, with its place in the file. Regular
expressions are compiled, and tested with adversarial texts, by `rules`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from packhorse.serve.errors import Invalid

MAX_RULES = 200
MAX_CONDITIONS = 200
MAX_DEPTH = 8
MAX_FILE_BYTES = 1 << 20

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Keyword = Annotated[str, Field(min_length=1, max_length=100, pattern=r"\S")]
Share = Annotated[float, Field(ge=0, le=1)]
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Condition(_Strict):
    """Exactly one of these fields is set."""

    keywords: Annotated[list[Keyword], Field(min_length=1, max_length=1000)] | None = None
    """Any of these words or phrases, case-insensitive."""
    regex: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """A search in the whole text; case-sensitive unless it begins with (?i)."""
    any_of: Annotated[list[Condition], Field(min_length=1)] | None = Field(None, alias="any")
    all_of: Annotated[list[Condition], Field(min_length=1)] | None = Field(None, alias="all")
    not_: Condition | None = Field(None, alias="not")

    @model_validator(mode="after")
    def _one(self) -> Condition:
        if len(self.model_fields_set) != 1:
            raise ValueError("must have exactly one of keywords, regex, any, all, not")
        return self

    @property
    def parts(self) -> list[Condition]:
        """The conditions directly inside this one."""
        return [*(self.any_of or ()), *(self.all_of or ()), *([self.not_] if self.not_ else ())]


class Rule(_Strict):
    """One rule. `adapter` null sends to the base. Rules are tried by descending `priority`, those
    of equal priority in the file's order.
    """

    name: Name
    adapter: Name | None
    when: Condition
    priority: int = 0
    over: Literal["last", "conversation"] = "last"
    """The last user message, or all user messages."""


class Accept(_Strict):
    """The results that a new version must reach in its self-test to be used; all are shares."""

    min_right: Share = 0.6
    max_wrong: Share = 0.03
    """Limit for the adapters' examples that go to another adapter, and for none_examples that go to
    any.
    """
    tolerance: Share = 0.05
    """How much worse than the version in use it may be: in the right routes of each adapter that
    both have, and in the wrong routes of all.
    """


class Learned(_Strict):
    enabled: bool = True
    wrong_route_rate: Annotated[float, Field(gt=0, le=0.2)] = 0.01
    """The share of held-out prompts that may pass a threshold to a wrong adapter."""
    none_examples: str | None = None
    """A JSONL file of prompts for the base itself, relative to the routes file's folder."""
    over: Literal["last", "conversation"] = "last"
    accept: Accept = Accept()


class Routes(_Strict):
    """The whole file. An empty one means the learned stage with its defaults."""

    default: Name | None = None
    """The adapter for conversations that no stage decides; null is the base."""
    forbidden: Literal["base", "refuse"] = "base"
    """Where a conversation goes whose adapter its key may not use."""
    learned: Learned = Learned()
    rules: Annotated[list[Rule], Field(max_length=MAX_RULES)] = []

    @property
    def adapters(self) -> list[str]:
        """Every adapter that the file names, once each, in the file's order."""
        named = [self.default, *(rule.adapter for rule in self.rules)]
        return list(dict.fromkeys(name for name in named if name is not None))


def read_routes(path: Path) -> Routes:
    """Read a routes file; makes `none_examples` an absolute path. Raises Invalid with the place."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"{path}: cannot be read: {error}.") from error
    routes = parse_routes(text, where=str(path))
    if routes.learned.none_examples is None:
        return routes
    absolute = str(path.parent / routes.learned.none_examples)
    learned = routes.learned.model_copy(update={"none_examples": absolute})
    return routes.model_copy(update={"learned": learned})


def parse_routes(text: str, *, where: str = "routes") -> Routes:
    """Parse a routes file's text (YAML or JSON). Raises Invalid, which says `where`, rule and
    field.
    """
    if len(text) > MAX_FILE_BYTES:
        raise Invalid(f"{where}: {len(text)} characters, above the limit of {MAX_FILE_BYTES}.")
    try:
        document = yaml.load(text, _LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML or JSON"
        raise Invalid(f"{where}: {place}{problem}.") from None
    try:
        routes = Routes.model_validate({} if document is None else document)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise Invalid(f"{where}: {_place(fault, document)}: {_hint(fault)}.") from None
    except RecursionError:
        raise Invalid(f"{where}: conditions refer to themselves; write them out.") from None
    seen: set[str] = set()
    for rule in routes.rules:
        if rule.name in seen:
            raise Invalid(f"{where}: two rules are called {rule.name!r}; give each its own name.")
        seen.add(rule.name)
        count, depth = _extent(rule.when)
        if count > MAX_CONDITIONS or depth > MAX_DEPTH:
            raise Invalid(
                f"{where}: rule {rule.name!r}: when: {count} conditions nested {depth} deep; at "
                f"most {MAX_CONDITIONS} and {MAX_DEPTH} are allowed. Split the rule."
            )
    return routes


def _extent(condition: Condition) -> tuple[int, int]:
    inner = [_extent(part) for part in condition.parts]
    return 1 + sum(count for count, _ in inner), 1 + max((depth for _, depth in inner), default=0)


def _place(fault: Any, document: Any) -> str:
    """`rule 'pills': when.any[2].regex`; rules by name where they have one, else by number."""
    steps = list(fault["loc"])
    begin = ""
    if len(steps) > 1 and steps[0] == "rules":
        rule = document["rules"][steps[1]]
        name = rule.get("name") if isinstance(rule, dict) else None
        begin = f"rule {name!r}" if isinstance(name, str) else f"rule number {steps[1] + 1}"
        steps = steps[2:]
    path = ""
    for step in steps:
        if isinstance(step, int):
            path += f"[{step + 1}]"
        else:
            path += "." * bool(path) + step
    return ": ".join(part for part in (begin, path) if part) or "the file"


def _hint(fault: Any) -> str:
    kind = fault["type"]
    if kind == "extra_forbidden":
        return "there is no such field here"
    if kind == "missing":
        return "is missing"
    if kind in {"model_type", "model_attributes_type"}:
        return "must be a mapping"
    hint = str(fault["msg"]).removeprefix("Value error, ")
    given = fault.get("input")
    if isinstance(given, str | int | float):
        hint = f"{str(given)[:80]!r}: {hint}"
    return hint
