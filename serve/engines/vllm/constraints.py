"""Bounds on structured outputs: what is too large is refused before the engine, which all requests
share, would compile it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vllm.sampling_params import StructuredOutputsParams

from serve.errors import Invalid
from serve.messages import Constraint

# Beyond these a constraint takes the engine seconds or gigabytes to compile, for everybody.
MAX_CONSTRAINT_CHARS = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_CHOICES = 1000
MAX_REPEAT = 10_000

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
        if not isinstance(value, str):
            check_schema(value)
    elif constraint.kind == "regex":
        _check_regex(value)
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


def check_schema(schema: Any, *, depth: int = 1) -> None:
    """Raises Invalid for a JSON schema that is too deep, or counts too far."""
    if depth > MAX_SCHEMA_DEPTH:
        raise Invalid(
            f"The JSON schema is nested deeper than {MAX_SCHEMA_DEPTH} levels; flatten it, or use "
            "$defs and $ref.",
            param="response_format",
        )
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in SCHEMA_REPEATS and isinstance(value, int | float) and value > MAX_REPEAT:
                raise Invalid(
                    f"{key}={value} in the JSON schema is above the limit of {MAX_REPEAT}; "
                    "lower it or leave it out.",
                    param="response_format",
                )
            if key == "pattern" and isinstance(value, str):
                _check_regex(value)
            check_schema(value, depth=depth + 1)
    elif isinstance(schema, list):
        for value in schema:
            check_schema(value, depth=depth + 1)


def _check_regex(pattern: str) -> None:
    """Bounds the product of all repeat counts: `(a{999}){999}` is a million states."""
    product = 1
    for low, high in REGEX_REPEAT.findall(pattern):
        product *= max(1, int(low or 0), int(high or 0))
        if product > MAX_REPEAT:
            raise Invalid(
                f"The repeat counts of a regular expression multiply to more than {MAX_REPEAT}; "
                "lower them, or use * and +.",
                param="structured_outputs",
            )
