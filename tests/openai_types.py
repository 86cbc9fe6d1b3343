"""Documents checked against the official client's types, strictly: every required field is there,
with its type, and no field that the types do not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from openai.types.responses import (
    InputTokenCountResponse,
    Response,
    ResponseStreamEvent,
)
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel, TypeAdapter


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def checked(kind: Any, document: Any) -> Any:
    """The document as an object of `kind`. Raises ValidationError, AssertionError."""
    made = _adapter(kind).validate_python(document)
    extra = list(_extras(made, ""))
    assert not extra, f"fields that {kind} does not have: {extra}"
    return made


def _extras(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from (f"{place}.{name}" for name in value.__pydantic_extra__ or ())
        for name in type(value).model_fields:
            yield from _extras(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, list):
        for each in value:
            yield from _extras(each, place)


def response(document: Any) -> Response:
    made: Response = checked(Response, document)
    return made


def item_list(document: Any) -> ResponseItemList:
    made: ResponseItemList = checked(ResponseItemList, document)
    return made


def token_count(document: Any) -> InputTokenCountResponse:
    made: InputTokenCountResponse = checked(InputTokenCountResponse, document)
    return made


def stream_events(text: str) -> list[Any]:
    """The events of a Responses stream, each of its type, their names and numbers checked; comments
    are skipped.
    """
    found = []
    for part in filter(None, text.split("\n\n")):
        if part.startswith(":"):
            continue
        name, data = part.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        assert document["sequence_number"] == len(found)
        found.append(checked(ResponseStreamEvent, document))
    return found


def rebuilt(events: list[Any]) -> list[dict[str, Any]]:
    """The output as a client puts it together from the deltas alone, checked against what each
    `done` event says.
    """
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        kind = event.type
        if kind == "response.output_item.added":
            assert event.output_index == len(items)
            items[event.output_index] = {"type": event.item.type, "id": event.item.id, "text": ""}
        elif kind == "response.content_part.added":
            assert event.part.text == ""
            assert items[event.output_index]["id"] == event.item_id
        elif kind.endswith(".delta"):
            item = items[event.output_index]
            assert item["id"] == event.item_id
            assert "done" not in item
            item["text"] += event.delta
        elif kind in ("response.output_text.done", "response.reasoning_text.done"):
            assert event.text == items[event.output_index]["text"]
        elif kind == "response.content_part.done":
            assert event.part.text == items[event.output_index]["text"]
        elif kind == "response.function_call_arguments.done":
            assert event.arguments == items[event.output_index]["text"]
        elif kind == "response.custom_tool_call_input.done":
            assert event.input == items[event.output_index]["text"]
        elif kind == "response.output_item.done":
            items[event.output_index]["done"] = event.item.model_dump(exclude_none=True)
    return [items[index] for index in sorted(items)]
