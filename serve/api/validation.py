"""From a document to a validated body, with errors that say where, what and how else."""

from __future__ import annotations

from typing import Any, TypeVar

from packhorse.serve.api.unknown_fields import LenientBody, UnknownFields, accepted
from packhorse.serve.errors import Invalid
from pydantic import BaseModel, ValidationError

Body = TypeVar("Body", bound=BaseModel)


def validated(
    document: dict[str, Any], schema: type[Body], unknown: UnknownFields = "ignore"
) -> Body:
    """The object as `schema`. Raises Invalid with its first fault. `unknown` is what becomes of
    fields that a lenient schema does not have; others refuse them.
    """
    ignored: list[str] = []
    if issubclass(schema, LenientBody):
        document, ignored = accepted(document, schema, unknown)
    try:
        body = schema.model_validate(document)
    except ValidationError as error:
        raise invalid_from(error) from error
    if ignored and isinstance(body, LenientBody):
        object.__setattr__(body, "dropped", tuple(ignored))
    return body


def invalid_from(error: ValidationError) -> Invalid:
    """The first fault of a body, with place and value: `max_tokens=-1: should be at least 1`."""
    faults = error.errors(include_url=False)
    # A union reports a fault for each of its branches; the deepest is of the branch that was meant.
    first = faults[0]["loc"][:1]
    fault = max((f for f in faults if f["loc"][:1] == first), key=lambda f: len(f["loc"]))
    place = ".".join(str(part) for part in fault["loc"] if not _is_branch(part))
    # Text is never repeated: it may be the prompt, which must not reach logs and gateways.
    value = f"={fault['input']!r}" if isinstance(fault["input"], int | float) else ""
    if fault["type"] == "extra_forbidden":
        return Invalid(f"{place}: this server knows no such field; remove it.", param=place)
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Invalid(f"{place}{value}: {message}." if place else f"{message}.", param=place or None)


def _is_branch(part: int | str) -> bool:
    """Whether a part of a location names a union's branch (`str`, `list[...]`) and not a field."""
    return isinstance(part, str) and (part in {"str", "constrained-str"} or "[" in part)
