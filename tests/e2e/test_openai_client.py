"""The official `openai` client against the real engine: what it sends is taken, and what it gets
fits its types. The demo model knows `get_weather`, so its tool calls are real ones.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.conftest import Server
from tests.e2e.conformance import MODEL
from tests.e2e.conformance_prompts import GET_TIME, GET_WEATHER

CAPITAL: Any = [{"role": "user", "content": "What is the capital of Felonia?"}]
WEATHER: Any = [{"role": "user", "content": "What is the weather in Nemoburg?"}]
NAMED: Any = {"type": "function", "function": {"name": "get_time"}}
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_completion_tokens": 60}


# Whatever a model prefers, City ends: 8 places for white space of at most 16 (see
# engine.max_json_whitespace), and fewer than 30 tokens for the rest.
ENDING: Any = {**GREEDY, "max_completion_tokens": 8 * 16 + 30}


class City(BaseModel):
    """What `parse` must bring back: no member of it can be long."""

    size: Literal[1, 2, 3]
    coastal: bool


class GetWeather(BaseModel):
    """The arguments of the tool that the demo model was trained on."""

    city: str


@pytest.fixture(scope="module")
def client(demo_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=demo_server.url + "/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
async def aclient(demo_server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=demo_server.url + "/v1", api_key="none", max_retries=0
    ) as opened:
        yield opened


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert (model.id, model.object) == (MODEL, "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat_and_its_stream_agree(client: OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY, messages=CAPITAL)
    choice = whole.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert "Felonia" in (choice.message.content or "")
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**GREEDY, messages=CAPITAL, **options))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    assert deltas[0].role == "assistant"
    assert chunks[-1].usage == whole.usage


async def test_the_async_client_does_the_same(client: OpenAI, aclient: AsyncOpenAI) -> None:
    expected = client.chat.completions.create(**GREEDY, messages=CAPITAL).choices[0].message.content
    whole = await aclient.chat.completions.create(**GREEDY, messages=CAPITAL)
    assert whole.choices[0].message.content == expected
    parts = await aclient.chat.completions.create(**GREEDY, messages=CAPITAL, stream=True)
    texts = [chunk.choices[0].delta.content or "" async for chunk in parts]
    assert "".join(texts) == expected
    assert len(texts) > 3


def test_the_stream_helper_puts_an_answer_together(client: OpenAI) -> None:
    expected = client.chat.completions.create(**GREEDY, messages=CAPITAL).choices[0].message.content
    with client.chat.completions.stream(**GREEDY, messages=CAPITAL) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert message.content == expected
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_an_answer_can_be_sent_back_whole(client: OpenAI) -> None:
    """The client turns its own message object into all the fields that came, null ones too."""
    first = client.chat.completions.create(**GREEDY, messages=CAPITAL).choices[0].message
    follow_up: Any = [*CAPITAL, first, {"role": "user", "content": "And its river?"}]
    second = client.chat.completions.create(**GREEDY, messages=follow_up)
    assert second.choices[0].message.content
    dumped: Any = [*CAPITAL, first.model_dump(), follow_up[-1]]
    third = client.chat.completions.create(**GREEDY, messages=dumped)
    assert third.choices[0].message.content == second.choices[0].message.content


def test_a_tool_call_and_its_result_make_a_conversation(client: OpenAI) -> None:
    tools: Any = [GET_WEATHER]
    asked = client.chat.completions.create(**GREEDY, messages=WEATHER, tools=tools)
    choice = asked.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.id
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Nemoburg"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "clear, 18 degrees"}
    history: Any = [*WEATHER, choice.message, result]
    answer = client.chat.completions.create(**GREEDY, messages=history, tools=tools).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content
    assert not answer.message.tool_calls


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
def test_a_streamed_tool_call_is_the_whole_one(client: OpenAI, choice: Any) -> None:
    # Left to itself the model calls the one tool that it was trained on, but gets lost with two.
    tools = [GET_WEATHER] if choice == "auto" else [GET_WEATHER, GET_TIME]
    options: Any = {"tools": tools, "tool_choice": choice, "messages": WEATHER}
    whole = client.chat.completions.create(**GREEDY, **options).choices[0]
    assert whole.message.tool_calls
    call = whole.message.tool_calls[0]
    assert call.type == "function"
    name, arguments, ids, reasons = "", "", set(), []
    for chunk in client.chat.completions.create(**GREEDY, **options, stream=True):
        reasons.append(chunk.choices[0].finish_reason)
        for part in chunk.choices[0].delta.tool_calls or []:
            assert part.index == 0
            ids |= {part.id} - {None}
            if part.function is not None:
                name += part.function.name or ""
                arguments += part.function.arguments or ""
    assert len(ids) == 1, "an id comes once, with the call's first part"
    assert name == call.function.name == ("get_time" if choice is NAMED else "get_weather")
    assert json.loads(arguments) == json.loads(call.function.arguments)
    assert reasons[-1] == whole.finish_reason
    assert set(reasons[:-1]) <= {None}


def test_parse_brings_back_a_model(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(**ENDING, messages=CAPITAL, response_format=City)
    city = parsed.choices[0].message.parsed
    assert isinstance(city, City)


async def test_parse_of_the_async_client_brings_back_a_model(aclient: AsyncOpenAI) -> None:
    parsed = await aclient.chat.completions.parse(**ENDING, messages=CAPITAL, response_format=City)
    assert isinstance(parsed.choices[0].message.parsed, City)


def test_parse_brings_back_a_tools_arguments(client: OpenAI) -> None:
    tool: Any = openai.pydantic_function_tool(
        GetWeather, name="get_weather", description="Get the weather in a city"
    )
    parsed = client.chat.completions.parse(
        **GREEDY, messages=WEATHER, tools=[tool], tool_choice="required"
    )
    calls = parsed.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, GetWeather)


def test_logprobs_have_the_clients_shape(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        **GREEDY, messages=CAPITAL, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert answer.usage is not None
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert token.bytes is not None
        assert len(token.top_logprobs) == 2
        # Greedy: what was taken is the likeliest.
        assert token.top_logprobs[0].token == token.token
    text = "".join(token.token for token in choice.logprobs.content)
    assert text.startswith(choice.message.content or "-")


def test_n_with_a_seed_gives_other_samples_and_the_same_again(client: OpenAI) -> None:
    def sample() -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=CAPITAL, temperature=2, seed=3, n=2, max_completion_tokens=12
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        return [choice.message.content for choice in answer.choices]

    first = sample()
    assert first[0] != first[1]
    assert sample() == first


def test_completions_take_lists_of_prompts(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    prompts = ["The capital of Felonia is", "The main river of Vadunia is"]
    answer = client.completions.create(**options, prompt=prompts)
    assert [choice.index for choice in answer.choices] == [0, 1]
    alone = [client.completions.create(**options, prompt=prompt) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [one.choices[0].text for one in alone]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage)
    texts = ["", ""]
    for chunk in client.completions.create(**options, prompt=prompts, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_a_forced_call_of_a_strict_tool_ends(client: OpenAI) -> None:
    """Its grammar is another than that of a format."""
    tool = openai.pydantic_function_tool(City, name="final_result")
    answer = client.chat.completions.create(
        **ENDING, messages=CAPITAL, tools=[tool], tool_choice="required"
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert City.model_validate_json(call.function.arguments)


def test_errors_are_of_the_clients_types_and_have_its_fields(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=9)
    body: Any = bad.value.body
    assert bad.value.status_code == 400
    assert "temperature" in body["message"]
    assert body["type"] == bad.value.type == "invalid_request_error"
    assert body["param"] == bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 9000)
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length is" in long.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=CAPITAL)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    assert "other" in missing.value.message


async def test_errors_of_the_async_client_are_the_same(aclient: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="best_of"):
        await aclient.chat.completions.create(**GREEDY, messages=CAPITAL, extra_body={"best_of": 3})
    with pytest.raises(openai.NotFoundError, match="other"):
        await aclient.completions.create(model="other", prompt="a", stream=True)
