"""Answers, events and errors of /v1/messages, read by the official package's own types. A field
that these do not have is a failure, as a required one is that is not there.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
from anthropic import BaseModel
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import TypeAdapter

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def read(kind: type[BaseModel] | TypeAdapter[Any], document: Any) -> Any:
    """The document as an object of this type. Raises ValidationError, AssertionError."""
    is_adapter = isinstance(kind, TypeAdapter)
    found = kind.validate_python(document) if is_adapter else kind.model_validate(document)  # type: ignore[union-attr]
    check_known(found)
    return found


def check_known(value: Any) -> None:
    """Raises AssertionError for a field that its type does not have."""
    if isinstance(value, list):
        for each in value:
            check_known(each)
    if isinstance(value, BaseModel):
        assert not value.model_extra, f"{type(value).__name__}: {value.model_extra}"
        for each in dict(value).values():
            check_known(each)


def message_of(response: httpx.Response) -> Message:
    """A whole answer."""
    assert response.status_code == 200, response.text
    assert response.headers["request-id"] == response.headers["x-request-id"]
    message: Message = read(Message, response.json())
    assert message.stop_reason is not None
    assert "stop_sequence" in response.json()
    return message


def tokens_of(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    counted: MessageTokensCount = read(MessageTokensCount, response.json())
    return counted.input_tokens


def error_of(response: httpx.Response) -> Any:
    """The error of a response: an object with `type` and `message`."""
    document = response.json()
    assert document["request_id"] == response.headers["request-id"]
    if response.status_code == 413:  # Anthropic's API has the type, its package has not
        assert document["error"].pop("type") == "request_too_large"
        document["error"]["type"] = "invalid_request_error"
    return read(ErrorResponse, document).error


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a stream, checked one by one and in their order; without pings."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return parsed(response.text)


def parsed(stream: str) -> list[Any]:
    """The events of a stream's text."""
    found = []
    for part in stream.split("\n\n"):
        if not part:
            continue
        name, _, data = part.partition("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        if document["type"] == "error":
            read(ErrorResponse, document)
            found.append(document)
        elif document != {"type": "ping"}:
            found.append(read(EVENT, document))
    check_order(found)
    return found


def check_order(events: list[Any]) -> None:
    """message_start, blocks that start, grow and stop one after the other, message_delta,
    message_stop. A stream that fails ends with an error.
    """
    kinds = [event["type"] if isinstance(event, dict) else event.type for event in events]
    if kinds[-1] == "error":
        events, kinds = events[:-1], kinds[:-1]
    else:
        assert kinds[-2:] == ["message_delta", "message_stop"]
        assert kinds[:-2].count("message_delta") == 0
    if not events:
        return
    assert kinds[0] == "message_start"
    count, is_open, types = 0, False, ""
    for event in events[1:]:
        if event.type == "content_block_start":
            assert not is_open
            assert event.index == count
            count, is_open, types = count + 1, True, event.content_block.type
        elif event.type == "content_block_delta":
            assert is_open
            assert event.index == count - 1
            deltas = {
                "text": {"text_delta"},
                "thinking": {"thinking_delta", "signature_delta"},
                "tool_use": {"input_json_delta"},
            }
            assert event.delta.type in deltas[types]
        elif event.type == "content_block_stop":
            assert is_open
            assert event.index == count - 1
            is_open = False


def put_together(events: list[Any]) -> dict[str, Any]:
    """What a stream said, in the form of a whole answer's JSON; a cut-off call as it was cut."""
    message: dict[str, Any] = json.loads(events[0].message.model_dump_json(exclude_none=True))
    blocks: list[dict[str, Any]] = []
    inputs: dict[int, str] = {}
    for event in events:
        if event.type == "content_block_start":
            blocks.append(json.loads(event.content_block.model_dump_json(exclude_none=True)))
        elif event.type == "content_block_delta":
            block, delta = blocks[event.index], event.delta
            if delta.type == "text_delta":
                block["text"] += delta.text
            elif delta.type == "thinking_delta":
                block["thinking"] += delta.thinking
            elif delta.type == "signature_delta":
                block["signature"] = delta.signature
            else:
                inputs[event.index] = inputs.get(event.index, "") + delta.partial_json
        elif event.type == "message_delta":
            message |= event.delta.model_dump(include={"stop_reason", "stop_sequence"})
            message["usage"] = event.usage.model_dump(exclude_none=True)
    for index, arguments in inputs.items():
        blocks[index]["input"] = json.loads(arguments)
    return {**message, "content": blocks}
