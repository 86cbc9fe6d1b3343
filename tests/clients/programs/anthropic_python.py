"""Anthropic's Python client."""

from __future__ import annotations

from typing import Any, Literal

import anthropic
from common import (
    CAPITAL,
    JSON_TOKENS,
    KEY,
    LONG,
    MAX_TOKENS,
    MODEL,
    RESULT,
    ROOT_URL,
    UNKNOWN_MODEL,
    WEATHER,
    WEATHER_TOOL,
    WRONG_KEY,
    call,
    city_of,
    main,
    refused,
    said,
    streamed,
)
from pydantic import BaseModel

client = anthropic.Anthropic(base_url=ROOT_URL, api_key=KEY, max_retries=0, timeout=60)
GREEDY: Any = {"model": MODEL, "max_tokens": MAX_TOKENS, "extra_body": {"temperature": 0}}
"""The present client has no argument for temperature."""
ASKED: Any = [{"role": "user", "content": CAPITAL}]
SKY: Any = [{"role": "user", "content": WEATHER}]
TOOL: Any = {
    "name": WEATHER_TOOL["name"],
    "description": WEATHER_TOOL["description"],
    "input_schema": WEATHER_TOOL["parameters"],
    "cache_control": {"type": "ephemeral"},
}
FORCED: Any = {
    **GREEDY, "messages": SKY, "tools": [TOOL], "tool_choice": {"type": "any"},
    "max_tokens": JSON_TOKENS,
}  # fmt: skip


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@call
def chat() -> Any:
    system: Any = [
        {"type": "text", "text": "Answer in a word.", "cache_control": {"type": "ephemeral"}}
    ]
    message = client.messages.create(**GREEDY, system=system, messages=ASKED)
    if message.stop_reason not in ("end_turn", "max_tokens") or not message.usage.output_tokens:
        raise AssertionError(f"{message.stop_reason}, {message.usage}")
    return said(text_of(message))


@call
def stream() -> Any:
    with client.messages.stream(**GREEDY, messages=ASKED) as events:
        parts = list(events.text_stream)
        message = events.get_final_message()
    if "".join(parts) != text_of(message) or message.stop_reason is None:
        raise AssertionError(f"{message.stop_reason}: the deltas are not the whole text")
    return streamed(parts, message.usage.output_tokens)


def second_turn(message: Any) -> Any:
    """The blocks of the answer go back, as objects and as model_dump() makes them."""
    if message.stop_reason != "tool_use":
        raise AssertionError(f"stop_reason is {message.stop_reason}")
    asked = next(block for block in message.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": asked.id, "content": RESULT}
    seen = {"city": city_of(asked.input)}
    for sent in (message.content, [block.model_dump() for block in message.content]):
        history: Any = [
            *SKY, {"role": "assistant", "content": sent}, {"role": "user", "content": [result]},
        ]  # fmt: skip
        seen |= said(text_of(client.messages.create(**GREEDY, tools=[TOOL], messages=history)))
    return seen


@call
def tools() -> Any:
    return second_turn(client.messages.create(**FORCED))


@call
def tools_streamed() -> Any:
    with client.messages.stream(**FORCED) as events:
        pieces = [event.partial_json for event in events if event.type == "input_json"]
        message = events.get_final_message()
    if not any(pieces):
        raise AssertionError("the tool's input did not come in pieces")
    return second_turn(message)


@call
def structured() -> Any:
    asked: Any = {**GREEDY, "max_tokens": JSON_TOKENS}
    message: Any = client.messages.parse(**asked, messages=ASKED, output_format=City)
    return message.parsed_output.model_dump()


@call
def wrong_key() -> Any:
    other = client.with_options(api_key=WRONG_KEY)
    return refused(
        lambda: other.messages.create(**GREEDY, messages=ASKED),
        anthropic.AuthenticationError,
        status=401,
    )


@call
def unknown_model() -> Any:
    asked = {**GREEDY, "model": UNKNOWN_MODEL}
    return refused(
        lambda: client.messages.create(**asked, messages=ASKED),
        anthropic.NotFoundError,
        status=404,
    )


@call
def too_long() -> Any:
    history: Any = [{"role": "user", "content": LONG}]
    return refused(
        lambda: client.messages.create(**GREEDY, messages=history),
        anthropic.BadRequestError,
        status=400,
    )


@call
def error_words() -> Any:
    """`error.type` and the request's id are Anthropic's, which other clients decide by."""
    long: Any = [{"role": "user", "content": LONG}]
    unknown = {**GREEDY, "model": UNKNOWN_MODEL}
    asked = {
        "authentication_error": lambda: client.with_options(api_key=WRONG_KEY).messages.create(
            **GREEDY, messages=ASKED
        ),
        "not_found_error": lambda: client.messages.create(**unknown, messages=ASKED),
        "invalid_request_error": lambda: client.messages.create(**GREEDY, messages=long),
    }
    found = {}
    for kind, ask in asked.items():
        try:
            ask()
        except anthropic.APIStatusError as error:
            body: Any = error.body
            found[kind] = (body["type"], body["error"]["type"], bool(error.request_id))
    if found != {kind: ("error", kind, True) for kind in asked}:
        raise AssertionError(f"(type, error.type, request-id) for each: {found}")
    return found


@call
def count_tokens() -> Any:
    counted = client.messages.count_tokens(model=MODEL, messages=ASKED).input_tokens
    used = client.messages.create(**GREEDY, messages=ASKED).usage
    whole = used.input_tokens + (used.cache_read_input_tokens or 0)
    whole += used.cache_creation_input_tokens or 0
    if counted != whole:
        raise AssertionError(f"{counted} is not {whole}")
    return {"input_tokens": counted}


if __name__ == "__main__":
    main()
