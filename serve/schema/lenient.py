"""Fields that a body's class does not have: dropped and told, unless leaving them out would change
the answer. `null` is the same as absent, at every level that has a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, PrivateAttr

from serve.errors import Invalid
from serve.ignored import OTHER, PLAIN, told

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
    _ignored: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with what clients write in another form in the form of the class."""
        return document

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of what was sent and has no effect: `user`, `messages.cache_control`."""
        return told((*self._ignored, *sorted(self.no_effect & self.model_fields_set)))


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
    fields, kept = _fields(schema), {}
    if issubclass(schema, LenientBody):
        document = schema.reshaped(document)
    for name, value in document.items():
        if value is None:
            continue
        if name not in fields:
            ignored.append(_dropped(name, value, schema, unknown, place))
            continue
        inner = fields[name]
        if inner is not None:
            below = f"{place}{name}."
            if isinstance(value, dict):
                value = _accepted(value, inner, unknown, below, ignored)
            elif isinstance(value, list):
                value = [
                    _accepted(each, inner, unknown, below, ignored)
                    if isinstance(each, dict)
                    else each
                    for each in value
                ]
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


@cache
def _fields(schema: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """The names that a class knows; with each the class of what is in it, or in its items."""
    found: dict[str, type[BaseModel] | None] = {}
    for name, field in schema.model_fields.items():
        names = [field.alias or name]
        if isinstance(field.validation_alias, AliasChoices):
            names = [str(choice) for choice in field.validation_alias.choices]
        found.update(dict.fromkeys(names, _class_in(field.annotation)))
    return found


def _class_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_class_in, get_args(annotation))), None)
