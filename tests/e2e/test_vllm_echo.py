"""The engine `vllm-echo`: the last message is the answer, and vLLM's parser reads it. Agents of
tests/clients are tried on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.conftest import DEMO, Server, running_server

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Nemoburg"}}\n</tool_call>'
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
PLACES = "Grüße aus Nemoburg  ☃ 漢字\n\nund 👩‍👩‍👧 "


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ("--engine", "vllm-echo", "--tool-call-parser", "hermes")
    folder = tmp_path_factory.mktemp("echo")
    with running_server(folder, str(DEMO / "model"), *arguments) as running:
        yield running


def ask(server: Server, content: Any, *more: Any, **options: Any) -> Any:
    client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": content}, *more]
    return client.chat.completions.create(model=server.model, messages=messages, **options)


def test_a_call_in_the_prompt_is_read_by_the_parser(server: Server) -> None:
    choice = ask(server, f"I look. {CALL}", tools=[TOOL]).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Nemoburg"}
    assert choice.message.content.strip() == "I look."


def test_a_call_is_streamed_in_pieces(server: Server) -> None:
    chunks = list(ask(server, f"I look. {CALL}", tools=[TOOL], stream=True))
    pieces = [call.function for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    assert [piece.name for piece in pieces if piece.name] == ["get_weather"]
    assert json.loads("".join(p.arguments or "" for p in pieces)) == {"city": "Nemoburg"}
    assert len(pieces) > 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_tools_nothing_is_parsed(server: Server) -> None:
    message = ask(server, CALL).choices[0].message
    assert message.tool_calls is None
    assert message.content == CALL


def test_the_result_of_a_call_is_the_answer(server: Server) -> None:
    called = ask(server, CALL, tools=[TOOL]).choices[0].message
    parts = [{"type": "text", "text": "clear,"}, {"type": "text", "text": "18 degrees"}]
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": parts}
    choice = ask(server, CALL, called, result, tools=[TOOL]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("clear,\n18 degrees", "stop")


def test_every_character_comes_once(server: Server) -> None:
    chunks = list(ask(server, PLACES, stream=True))
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == PLACES
    assert len([part for part in parts if part]) > 10


def test_the_limit_on_tokens_holds(server: Server) -> None:
    answer = ask(server, PLACES, max_completion_tokens=3, n=2)
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
    assert answer.usage.completion_tokens == 6
    assert PLACES.startswith(answer.choices[1].message.content)
