"""From a JSON document to a validated body, with errors that say where, what and how else.

Fields that a body's class does not have are dropped and reported, unless the answer would differ
without them. `null` means the same as absent, at every level that has a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError

from packhorse.serve.errors import Invalid
from packhorse.serve.ignored import OTHER, PLAIN, told

UnknownFields = Literal["ignore", "refuse"]
Body = TypeVar("Body", bound=BaseModel)


class Unsupported(NamedTuple):
    """A field that is refused, because the answer would differ without it."""

    harmless: tuple[Any, ...]
    """Values for which the answer is the same, so that the field may be dropped."""
    instead: str
    """What the client can send or do instead."""


class LenientBody(BaseModel):
    """A body of inference. Unknown fields are dropped; numbers may be strings, as in vLLM."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    # Fields of the class that have no effect.
    no_effect: ClassVar[frozenset[str]] = frozenset()
    # Names of dropped fields. A private attribute of pydantic's would slow down every message.
    dropped: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document, with alternative forms of a field brought into the form of the class."""
        return document

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of fields that were sent and have no effect: `user`, `messages.cache_control`."""
        without_effect = self.no_effect & self.model_fields_set
        if not self.dropped and not without_effect:
            return ()
        return told((*self.dropped, *sorted(without_effect)))


class StrictBody(BaseModel):
    """What operators send: a misspelled field must not change a server, so it is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def validated(
    document: dict[str, Any], schema: type[Body], unknown: UnknownFields = "ignore"
) -> Body:
    """The document as an object of `schema`. Raises Invalid with the first fault. `unknown` says
    whether unknown fields of a LenientBody are ignored or refused; a StrictBody refuses them.
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
    """The first fault, with its place and value: `max_tokens=-1: should be at least 1`."""
    faults = error.errors(include_url=False)
    # A union reports a fault for each of its branches; the deepest belongs to the intended one.
    first = faults[0]["loc"][:1]
    fault = max((f for f in faults if f["loc"][:1] == first), key=lambda f: len(f["loc"]))
    place = ".".join(str(part) for part in fault["loc"] if not _is_branch(part))
    # Text is never quoted: it may be the prompt, which must not reach logs and gateways.
    value = f"={fault['input']!r}" if isinstance(fault["input"], int | float) else ""
    if fault["type"] == "extra_forbidden":
        return Invalid(f"{place}: this server knows no such field; remove it.", param=place)
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Invalid(f"{place}{value}: {message}." if place else f"{message}.", param=place or None)


def _is_branch(part: int | str) -> bool:
    """Whether a part of a location names a union's branch (`str`, `list[...]`) and not a field."""
    return isinstance(part, str) and (part in {"str", "constrained-str"} or "[" in part)


def accepted(
    document: dict[str, Any], schema: type[BaseModel], unknown: UnknownFields
) -> tuple[dict[str, Any], list[str]]:
    """The document without its unknown fields, and the names of these. Raises Invalid for a field
    whose absence would change the answer; with `refuse`, for every unknown field.
    """
    ignored: list[str] = []
    return _accepted(document, schema, unknown, "", ignored), ignored


def _accepted(
    document: dict[str, Any],
    schema: type[BaseModel],
    unknown: UnknownFields,
    place: str,
    ignored: list[str],
) -> dict[str, Any]:
    known = _known(schema)
    if known.reshapes is not None:
        document = known.reshapes(document)
    kept = document
    if not document.keys() <= known.names or None in document.values():  # rare
        kept = {}
        for name, value in document.items():
            if value is None:
                continue
            if name in known.names:
                kept[name] = value
            else:
                ignored.append(_dropped(name, value, schema, unknown, place))
    for name, inner in known.inner:
        value = kept.get(name)
        if value is None:
            continue
        if isinstance(value, dict):
            value = _accepted(value, inner, unknown, f"{place}{name}.", ignored)
        elif isinstance(value, list):
            below = f"{place}{name}."
            value = [
                _accepted(each, inner, unknown, below, ignored) if isinstance(each, dict) else each
                for each in value
            ]
        else:
            continue
        if kept is document:
            kept = dict(document)
        kept[name] = value
    return kept


def _dropped(
    name: str, value: Any, schema: type[BaseModel], unknown: UnknownFields, place: str
) -> str:
    """The name of a dropped field, to be reported. Raises Invalid when it cannot be dropped."""
    shown = f"{place}{name}"
    if not PLAIN.fullmatch(shown):
        shown = OTHER
    known = issubclass(schema, LenientBody) and schema.unsupported.get(name)
    if known and value not in known.harmless:
        raise Invalid(
            f"{shown}: not supported here, and the answer would be another without it; "
            f"{known.instead}.",
            param=shown,
        )
    if unknown == "refuse" and not known:
        raise Invalid(f"{shown}: this server knows no such field; remove it.", param=shown)
    return shown


class _Known(NamedTuple):
    """What `_accepted` needs to know of a class, read once."""

    names: frozenset[str]
    """Its fields, aliases included."""
    inner: tuple[tuple[str, type[BaseModel]], ...]
    """Fields that hold another class or a list of it, with that class."""
    reshapes: Callable[[dict[str, Any]], dict[str, Any]] | None
    """Its `reshaped`, when it has one of its own."""


@cache
def _known(schema: type[BaseModel]) -> _Known:
    found: dict[str, type[BaseModel] | None] = {}
    for name, field in schema.model_fields.items():
        names = [field.alias or name]
        if isinstance(field.validation_alias, AliasChoices):
            names = [str(choice) for choice in field.validation_alias.choices]
        found.update(dict.fromkeys(names, _class_in(field.annotation)))
    inner = tuple((name, below) for name, below in found.items() if below is not None)
    reshapes = None
    if issubclass(schema, LenientBody) and "reshaped" in {
        name for base in schema.__mro__ if base is not LenientBody for name in vars(base)
    }:
        reshapes = schema.reshaped
    return _Known(frozenset(found), inner, reshapes)


def _class_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_class_in, get_args(annotation))), None)
