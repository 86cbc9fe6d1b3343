"""The Responses API on the real engine: the same requests as chat give the same answers, and the
official client does with it what it does with OpenAI's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests import openai_types
from tests.conftest import Server
from tests.e2e.conformance import MODEL
from tests.e2e.conformance_prompts import GET_TIME, GET_WEATHER
from tests.e2e.same_requests import (
    SAME,
    SPECIAL,
    Outcome,
    Same,
    as_response,
    chat_outcome,
    chat_stream_outcome,
    normal,
    streaming,
)
from tests.e2e.test_openai_client import City

URL = "/v1/responses"
WEATHER: Any = {"type": "function", **GET_WEATHER["function"], "strict": False}
TIME: Any = {"type": "function", **GET_TIME["function"]}
ASKED = "What is the weather in Nemoburg?"
CAPITAL = "What is the capital of Felonia?"
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 60}
# See tests/e2e/test_openai_client.py: whatever a model prefers, such an answer ends.
ENDING: Any = {**GREEDY, "max_output_tokens": 8 * 16 + 30}


@pytest.fixture(scope="module")
def http(demo_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_server.url, timeout=120) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=demo_server.url + "/v1", api_key="none", max_retries=0) as opened:
        yield opened


def outcome(document: dict[str, Any]) -> Outcome:
    """Of a response, checked against the client's types."""
    made = openai_types.response(document)
    assert made.usage is not None
    calls = [item for item in made.output if item.type == "function_call"]
    reason = "tool_calls" if calls else "stop"
    if made.status == "incomplete":
        reason = "length"
    return Outcome(
        made.output_text,
        tuple((call.name, call.arguments) for call in calls),
        made.usage.input_tokens,
        made.usage.output_tokens,
        reason,
    )


@pytest.mark.parametrize(
    "same",
    [*SPECIAL, *(pytest.param(same, marks=pytest.mark.thorough) for same in SAME[len(SPECIAL) :])],
    ids=lambda same: same.name,
)
def test_a_response_is_what_chat_answers(http: httpx.Client, same: Same) -> None:
    chat = http.post("/v1/chat/completions", json={"model": MODEL, **same.chat})
    assert chat.status_code == 200, chat.text
    expected = normal(chat_outcome(chat.json()))
    body = {"model": MODEL, **as_response(same.chat)}
    whole = http.post(URL, json=body)
    assert whole.status_code == 200, whole.text
    assert normal(outcome(whole.json())) == expected
    # A stream of chat's, which says less than a whole answer of a call that is cut.
    streamed = http.post("/v1/chat/completions", json={"model": MODEL, **streaming(same.chat)})
    expected = normal(chat_stream_outcome(streamed.text))
    streamed = http.post(URL, json={**body, "stream": True})
    events = openai_types.stream_events(streamed.text)
    last = json.loads(events[-1].response.model_dump_json(exclude_unset=True, by_alias=True))
    assert normal(outcome(last)) == expected
    assert [item["done"] for item in openai_types.rebuilt(events)] == [
        item.model_dump(exclude_none=True) for item in events[-1].response.output
    ]


def test_a_text_and_its_stream_agree(client: OpenAI) -> None:
    whole = client.responses.create(**GREEDY, input=CAPITAL)
    assert "Felonia" in whole.output_text
    assert whole.status == "completed"
    with client.responses.stream(**GREEDY, input=CAPITAL) as stream:
        deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text
    assert len(deltas) > 3
    assert final.usage == whole.usage
    count = client.responses.input_tokens.count(model=MODEL, input=CAPITAL)
    assert whole.usage is not None
    assert count.input_tokens == whole.usage.input_tokens


def test_a_tool_is_called_and_its_result_continues(client: OpenAI) -> None:
    first = client.responses.create(**GREEDY, input=ASKED, tools=[WEATHER])
    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Nemoburg"})
    output: Any = {
        "type": "function_call_output", "call_id": call.call_id, "output": "clear, 18 degrees",
    }  # fmt: skip
    chained = client.responses.create(
        **GREEDY, input=[output], tools=[WEATHER], previous_response_id=first.id
    )
    asked: Any = {"role": "user", "content": ASKED}
    whole = client.responses.create(
        **GREEDY, input=[asked, *first.output, output], tools=[WEATHER], store=False
    )
    assert chained.output_text
    assert chained.output_text == whole.output_text
    assert chained.usage == whole.usage


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_time"}])
def test_a_forced_call_is_a_call(client: OpenAI, choice: Any) -> None:
    asked: Any = {**GREEDY, "input": ASKED, "tools": [WEATHER, TIME], "tool_choice": choice}
    whole = client.responses.create(**asked)
    call = whole.output[0]
    assert call.type == "function_call"
    assert call.name == ("get_weather" if choice == "required" else "get_time")
    assert json.loads(call.arguments)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    streamed = final.output[0]
    assert streamed.type == "function_call"
    assert json.loads(streamed.arguments) == json.loads(call.arguments)
    assert "response.function_call_arguments.delta" in kinds


def test_a_custom_tool_gets_its_text(client: OpenAI) -> None:
    # What the model was trained to call, with another form of its arguments.
    tool: Any = {"type": "custom", "name": "get_weather", "description": "The weather of a city"}
    choice: Any = {"type": "custom", "name": "get_weather"}
    # Streamed: free text need not end, and a whole answer that is cut has no calls in chat either.
    events = list(
        client.responses.create(
            **GREEDY, input=ASKED, tools=[tool], tool_choice=choice, stream=True
        )
    )
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    answer = last.response
    call = answer.output[0]
    assert call.type == "custom_tool_call"
    assert call.name == "get_weather"
    assert call.input
    assert not call.input.startswith("{")
    output: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    more = client.responses.create(
        **GREEDY, input=[output], tools=[tool], previous_response_id=answer.id
    )
    assert more.status in ("completed", "incomplete")


def test_parse_brings_back_a_model(client: OpenAI) -> None:
    parsed = client.responses.parse(**ENDING, input=CAPITAL, text_format=City)
    assert isinstance(parsed.output_parsed, City)
    with client.responses.stream(**ENDING, input=CAPITAL, text_format=City) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_an_answer_that_is_cut_says_so(client: OpenAI) -> None:
    cut: Any = {**GREEDY, "max_output_tokens": 2, "input": CAPITAL}
    whole = client.responses.create(**cut)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**cut, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text


def test_logprobs_have_the_clients_shape(client: OpenAI) -> None:
    asked: Any = {
        **GREEDY, "input": CAPITAL, "include": ["message.output_text.logprobs"], "top_logprobs": 2,
    }  # fmt: skip
    answer = client.responses.create(**asked)
    message = answer.output[0]
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    assert "".join(entry.token for entry in part.logprobs).startswith(part.text)
    events = list(client.responses.create(**asked, stream=True))
    told = [
        entry.token
        for event in events
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert "".join(told).startswith(part.text)


def test_truncation_makes_a_conversation_fit(client: OpenAI) -> None:
    turns: Any = [
        turn
        for number in range(200)
        for turn in (
            {"role": "user", "content": f"Number {number}: " + "remember this, please. " * 10},
            {"role": "assistant", "content": "I will."},
        )
    ]
    asked: Any = {**GREEDY, "input": [*turns, {"role": "user", "content": CAPITAL}]}
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(**asked)
    assert long.value.code == "context_length_exceeded"
    raw = client.responses.with_raw_response.create(**asked, truncation="auto")
    assert int(raw.headers["x-packhorse-dropped-items"]) > 10
    usage = raw.parse().usage
    assert usage is not None
    assert usage.output_tokens > 0


def test_the_background_answers_as_a_call_does(client: OpenAI) -> None:
    expected = client.responses.create(**GREEDY, input=CAPITAL).output_text
    made = client.responses.create(**GREEDY, input=CAPITAL, background=True)
    assert made.status == "queued"
    while (found := client.responses.retrieve(made.id)).status in ("queued", "in_progress"):
        pass
    assert (found.status, found.output_text) == ("completed", expected)
