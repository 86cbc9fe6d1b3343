"""Anthropic's Messages on the real engine: with the official client, and against chat, which must
say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from anthropic.types import ToolUseBlock

from tests.anthropic_types import (
    COUNT,
    MESSAGES,
    error_of,
    events_of,
    message_of,
    put_together,
    tokens_of,
)
from tests.client import CHAT
from tests.conftest import Server
from tests.e2e.conformance import MODEL
from tests.e2e.conformance_prompts import GET_TIME, GET_WEATHER
from tests.e2e.same_requests import SAME, SPECIAL, Outcome, Same, chat_outcome, normal

CAPITAL: Any = [{"role": "user", "content": "What is the capital of Felonia?"}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Nemoburg?"}]
# The client has no temperature any more; the server takes it.
GREEDY: Any = {"model": MODEL, "max_tokens": 60, "extra_body": {"temperature": 0}}
FIELDS = {"max_completion_tokens": "max_tokens", "stop": "stop_sequences"}
TRANSLATED = {"messages", "tools", "tool_choice", "parallel_tool_calls", "response_format"}
CHOICES = {"auto": "auto", "required": "any", "none": "none"}
REASONS = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls",
}  # fmt: skip
# A PNG of one pixel.
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
SAID = [same for same in SAME if same.messages]
STREAMED = [*(same for same in SAID if same in SPECIAL), SAID[-1], SAID[-2]]


def with_schemas(chat: dict[str, Any]) -> dict[str, Any]:
    """The chat body with a schema for every tool: Anthropic's API needs one."""
    if "tools" not in chat:
        return chat
    bare = {"parameters": {"type": "object", "properties": {}}}
    tools = [{**tool, "function": {**bare, **tool["function"]}} for tool in chat["tools"]]
    return {**chat, "tools": tools}


def tool_of(tool: dict[str, Any]) -> Any:
    """OpenAI's tool in Anthropic's form."""
    function = dict(tool["function"])
    return {"input_schema": function.pop("parameters"), **function}


def as_message(chat: dict[str, Any]) -> dict[str, Any]:
    """The body of POST /v1/messages that says the same as a chat body."""
    body = {FIELDS.get(name, name): value for name, value in chat.items() if name not in TRANSLATED}
    messages = list(chat["messages"])
    if messages[0]["role"] == "system":
        body["system"] = messages.pop(0)["content"]
    body["messages"] = [turn_of(message) for message in messages]
    if "tools" in chat:
        body["tools"] = [tool_of(tool) for tool in chat["tools"]]
    choice = chat.get("tool_choice", "auto" if "parallel_tool_calls" in chat else None)
    if choice is not None:
        named = isinstance(choice, dict)
        body["tool_choice"] = (
            {"type": "tool", **choice["function"]} if named else {"type": CHOICES[choice]}
        )
    if "parallel_tool_calls" in chat:
        body["tool_choice"]["disable_parallel_tool_use"] = not chat["parallel_tool_calls"]
    return body


def turn_of(message: dict[str, Any]) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    if role == "tool":
        answered = {"tool_use_id": message["tool_call_id"], "content": content}
        return {"role": "user", "content": [{"type": "tool_result", **answered}]}
    calls = [
        {
            "type": "tool_use",
            "id": call["id"],
            "name": call["function"]["name"],
            "input": json.loads(call["function"]["arguments"]),
        }
        for call in message.get("tool_calls") or ()
    ]
    if not calls:
        return {"role": role, "content": content}
    return {"role": role, "content": [*([{"type": "text", "text": content}] if content else []),
                                      *calls]}  # fmt: skip


def outcome_of(document: dict[str, Any]) -> Outcome:
    """Of a whole message, or of a stream put together."""
    blocks, usage = document["content"], document["usage"]
    return Outcome(
        "".join(block["text"] for block in blocks if block["type"] == "text"),
        tuple((b["name"], json.dumps(b["input"])) for b in blocks if b["type"] == "tool_use"),
        usage["input_tokens"] + usage["cache_read_input_tokens"],
        usage["output_tokens"],
        REASONS[document["stop_reason"]],
    )


@pytest.fixture(scope="module")
def http(demo_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_server.url, timeout=120) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[Anthropic]:
    with Anthropic(base_url=demo_server.url, api_key="none", max_retries=0) as opened:
        yield opened


@pytest.mark.parametrize("same", SAID, ids=[same.name for same in SAID])
def test_a_message_says_what_the_chat_says(http: httpx.Client, same: Same) -> None:
    asked = with_schemas(same.chat)
    chat = http.post(CHAT, json={"model": MODEL, **asked})
    assert chat.status_code == 200, chat.text
    expected = normal(chat_outcome(chat.json()))
    body = {"model": MODEL, **as_message(asked)}
    whole = http.post(MESSAGES, json=body)
    message_of(whole)
    assert "x-packhorse-ignored" not in whole.headers
    assert normal(outcome_of(whole.json())) == expected
    if same in STREAMED:
        streamed = put_together(events_of(http.post(MESSAGES, json={**body, "stream": True})))
        assert normal(outcome_of(streamed)) == expected
    del body["max_tokens"]
    assert tokens_of(http.post(COUNT, json=body)) == expected.prompt_tokens


def test_the_official_client_asks_streams_and_goes_on(client: Anthropic) -> None:
    message = client.messages.create(**GREEDY, messages=CAPITAL, system="Be brief.")
    (block,) = message.content
    assert block.type == "text"
    assert "Felonia" in block.text
    assert message.stop_reason == "end_turn"
    with client.messages.stream(**GREEDY, messages=CAPITAL, system="Be brief.") as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == block.text
    assert len(pieces) > 3
    assert final.usage.output_tokens == message.usage.output_tokens
    follow_up: Any = [*CAPITAL, message.to_param(), {"role": "user", "content": "And its river?"}]
    assert client.messages.create(**GREEDY, messages=follow_up).content


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_time"}], ids=str)
def test_a_forced_call_comes_whole_and_streamed(client: Anthropic, choice: Any) -> None:
    tools: Any = [tool_of(GET_WEATHER), tool_of(GET_TIME)]
    options: Any = {"tools": tools, "tool_choice": choice, "messages": WEATHER}
    message = client.messages.create(**GREEDY, **options)
    (call, *_) = message.content
    assert isinstance(call, ToolUseBlock)
    assert call.name == choice.get("name", "get_weather")
    assert message.stop_reason == "tool_use"
    with client.messages.stream(**GREEDY, **options) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert "input_json" in kinds
    (streamed, *_) = final.content
    assert isinstance(streamed, ToolUseBlock)
    assert (streamed.name, streamed.input) == (call.name, call.input)
    assert final.stop_reason == "tool_use"


def test_a_call_and_its_result_make_a_conversation(client: Anthropic) -> None:
    tools: Any = [tool_of(GET_WEATHER)]
    asked = client.messages.create(**GREEDY, messages=WEATHER, tools=tools)
    assert asked.stop_reason == "tool_use"
    (call,) = [block for block in asked.content if isinstance(block, ToolUseBlock)]
    assert call.input == {"city": "Nemoburg"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "clear, 18 degrees"}
    history: Any = [*WEATHER, asked.to_param(), {"role": "user", "content": [result]}]
    answer = client.messages.create(**GREEDY, messages=history, tools=tools)
    assert answer.stop_reason == "end_turn"
    assert [block.type for block in answer.content] == ["text"]


def test_an_answer_continues_what_was_begun(client: Anthropic) -> None:
    whole = client.messages.create(**GREEDY, messages=CAPITAL).content[0]
    assert whole.type == "text"
    begun = whole.text[: whole.text.index("Felonia") + len("Felonia")]
    prefill: Any = [*CAPITAL, {"role": "assistant", "content": begun}]
    rest = client.messages.create(**GREEDY, messages=prefill).content[0]
    assert rest.type == "text"
    assert begun + rest.text == whole.text


def test_a_stop_sequence_and_a_schema(client: Anthropic) -> None:
    stopped = client.messages.create(**GREEDY, messages=CAPITAL, stop_sequences=["Felonia"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Felonia")
    schema = {
        "type": "object",
        "properties": {"size": {"enum": [1, 2, 3]}},
        "required": ["size"],
        "additionalProperties": False,
    }
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    options = {**GREEDY, "max_tokens": 120}
    found = client.messages.create(**options, messages=CAPITAL, output_config=config).content[0]
    assert found.type == "text"
    assert set(json.loads(found.text)) == {"size"}


def test_a_model_that_reads_text_refuses_an_image(http: httpx.Client) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is it?"}]
    body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": content}]}
    response = http.post(MESSAGES, json=body)
    assert response.status_code == 400
    assert "image" in error_of(response).message.lower()
    assert PIXEL not in response.text


def test_too_long_a_prompt_says_so_in_the_words_that_agents_look_for(http: httpx.Client) -> None:
    body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "x " * 9000}]}
    response = http.post(MESSAGES, json=body)
    assert response.status_code == 400
    assert "prompt is too long" in response.json()["error"]["message"]
