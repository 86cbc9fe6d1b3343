"""Fields that a body's class does not have: dropped and told, unless leaving them out would change
the answer. `null` is the same as absent, at every level that has a class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from packhorse.serve.errors import Invalid
from packhorse.serve.ignored import OTHER, PLAIN, told
from pydantic import AliasChoices, BaseModel, ConfigDict

UnknownFields = Literal["ignore", "refuse"]


class Unsupported(NamedTuple):
    """A field that would change the answer, were it known. These values of it would not."""

    harmless: tuple[Any, ...]
    instead: str


class LenientBody(BaseModel):
    """What clients send for an answer. Numbers may come as text, as vLLM takes them."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    # Known to the class, and of no effect.
    no_effect: ClassVar[frozenset[str]] = frozenset()
    # What was dropped. No private attribute of pydantic's, which every message would pay for.
    dropped: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with what clients write in another form in the form of the class."""
        return document

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of what was sent and has no effect: `user`, `messages.cache_control`."""
        without_effect = self.no_effect & self.model_fields_set
        if not self.dropped and not without_effect:
            return ()
        return told((*self.dropped, *sorted(without_effect)))


def accepted(
    document: dict[str, Any], schema: type[BaseModel], unknown: UnknownFields
) -> tuple[dict[str, Any], list[str]]:
    """The document without what the schema does not know, and the names of that. Raises Invalid for
    a field whose absence would change the answer; with `refuse`, for every unknown one.
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
    if not document.keys() <= known.names or None in document.values():  # seldom
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
    """The name to tell. Raises Invalid when it cannot be dropped."""
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
    """Of a class: its names, those of them that hold another class or a list of it, and how it
    wants its document.
    """

    names: frozenset[str]
    inner: tuple[tuple[str, type[BaseModel]], ...]
    reshapes: Callable[[dict[str, Any]], dict[str, Any]] | None


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
