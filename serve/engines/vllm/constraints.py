"""Bounds on structured outputs: a constraint that is too large is refused before the engine, which
all requests share, would compile it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vllm.sampling_params import StructuredOutputsParams

from packhorse.serve.errors import Invalid
from packhorse.serve.messages import Constraint

# Beyond these, compiling a constraint takes seconds or gigabytes, and all requests wait for it.
MAX_CONSTRAINT_CHARS = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_CHOICES = 1000
MAX_REPEAT = 10_000
# xgrammar's time for a schema's `pattern` grows with the square of its repeat counts: 0.1 s here.
MAX_PATTERN_REPEATS = 1000
MAX_DIGITS = 9
INT64_MAX = 2**63 - 1

# A regex's {m,n}, and the keywords of a JSON schema that repeat in the same way.
REGEX_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
SCHEMA_REPEATS = frozenset(
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
)


def structured_outputs(constraint: Constraint) -> StructuredOutputsParams:
    """vLLM's form of a constraint that is within bounds. Raises Invalid for one that is not."""
    value = constraint.value
    _check_size(constraint)
    if constraint.kind == "json":
        check_schema(value)
        check_integers(value, param="structured_outputs")
    elif constraint.kind in ("regex", "grammar") and _repeats(value) > MAX_REPEAT:
        raise Invalid(
            f"The repeat counts multiply to more than {MAX_REPEAT}; lower them, or use * and +.",
            param="structured_outputs",
        )
    elif constraint.kind == "choice":
        value = list(value)
    return StructuredOutputsParams(**{constraint.kind: value})


def _check_size(constraint: Constraint) -> None:
    value = constraint.value
    size = len(value) if isinstance(value, str) else len(json.dumps(value))
    if size > MAX_CONSTRAINT_CHARS:
        raise Invalid(
            f"The {constraint.kind} constraint has {size} characters, above the limit of "
            f"{MAX_CONSTRAINT_CHARS}; simplify it.",
            param="structured_outputs",
        )
    if constraint.kind == "choice" and len(value) > MAX_CHOICES:
        raise Invalid(
            f"There are {len(value)} choices, above the limit of {MAX_CHOICES}; send fewer.",
            param="structured_outputs",
        )


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises Invalid for tools whose schemas, which become one grammar, are out of bounds."""
    schemas = [tool["function"].get("parameters") or {} for tool in tools]
    size = len(json.dumps(schemas))
    if size > MAX_CONSTRAINT_CHARS:
        raise Invalid(
            f"The tools' parameters have {size} characters, above the limit of "
            f"{MAX_CONSTRAINT_CHARS}; send fewer tools, or shorter schemas.",
            param="tools",
        )
    check_schema(schemas, param="tools")
    check_integers(schemas, param="tools")


def check_schema(schema: Any, *, param: str = "structured_outputs") -> None:
    """Raises Invalid for a JSON schema, or several, that is too deep or counts too far."""
    repeats = sum(
        _repeats(value)
        for key, value in _members(schema, param)
        if key == "pattern" and isinstance(value, str)
    )
    if repeats > MAX_PATTERN_REPEATS:
        raise Invalid(
            f"The repeat counts of the schema's patterns come to {repeats}, above the limit of "
            f"{MAX_PATTERN_REPEATS}; lower them, or use * and +.",
            param=param,
        )
    for key, value in _members(schema, param):
        if key in SCHEMA_REPEATS and isinstance(value, int | float) and value > MAX_REPEAT:
            raise Invalid(
                f"{key}={value} in the JSON schema is above the limit of {MAX_REPEAT}; lower it or "
                "leave it out.",
                param=param,
            )


def check_integers(document: Any, *, param: str) -> None:
    """Raises Invalid for an integer that does not fit into 64 bits: what goes to the engine's
    process could not be encoded.
    """
    for _, value in _members(document, param):
        if isinstance(value, int) and not -INT64_MAX <= value <= INT64_MAX:
            raise Invalid(
                "An integer does not fit into 64 bits; write it as a number with an exponent.",
                param=param,
            )


def _members(document: Any, param: str, depth: int = 1) -> Iterator[tuple[str | None, Any]]:
    """Every value of a JSON document with its key, all levels. Raises Invalid when it is too deep
    or holds an integer that is too long.
    """
    if depth > MAX_SCHEMA_DEPTH:
        raise Invalid(
            f"The JSON is nested deeper than {MAX_SCHEMA_DEPTH} levels; flatten it, or use $defs "
            "and $ref.",
            param=param,
        )
    items: Iterable[tuple[str | None, Any]] = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = ((None, value) for value in document)
    for key, value in items:
        yield key, value
        yield from _members(value, param, depth + 1)


def _repeats(pattern: str) -> int:
    """The product of all repeat counts: `(a{999}){999}` is a million states. Grammars count in the
    same way as regular expressions.
    """
    product = 1
    for counts in REGEX_REPEAT.findall(pattern):
        # More digits than that are not worth reading (and Python refuses to, from 4300).
        product *= max(
            10**MAX_DIGITS if len(digits) > MAX_DIGITS else max(1, int(digits or 0))
            for digits in counts
        )
    return product
