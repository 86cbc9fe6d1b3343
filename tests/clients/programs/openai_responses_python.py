"""The official Python client on the Responses API."""

from __future__ import annotations

import json
from time import sleep
from typing import Any, Literal

import openai
from common import (
    BASE_URL,
    CAPITAL,
    JSON_TOKENS,
    KEY,
    LONG,
    MAX_TOKENS,
    MODEL,
    RESULT,
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

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=60)
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": MAX_TOKENS}
TOOL: Any = {"type": "function", "strict": False, **WEATHER_TOOL}
FORCED: Any = {
    **GREEDY, "input": WEATHER, "tools": [TOOL], "tool_choice": "required",
    "max_output_tokens": JSON_TOKENS,
}  # fmt: skip
ENDED = ("completed", "incomplete")


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


def ended(response: Any) -> Any:
    """A response that has ended, be it at the limit of tokens."""
    if response.status not in ENDED or not response.usage.output_tokens:
        raise AssertionError(f"{response.status}, {response.usage}, {response.error}")
    return response


@call
def chat() -> Any:
    asked: Any = {**GREEDY, "instructions": "Answer in a word."}
    return said(ended(client.responses.create(**asked, input=CAPITAL)).output_text)


@call
def stream() -> Any:
    """The SDK's helper puts the events together, and fails on one that has no place."""
    parts, numbers, kinds = [], [], []
    with client.responses.stream(**GREEDY, input=CAPITAL) as events:
        for event in events:
            numbers.append(event.sequence_number)
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                parts.append(event.delta)
    # After an answer that was cut the helper has no final response: the last event has it.
    if numbers != list(range(len(numbers))):
        raise AssertionError(f"sequence numbers: {numbers}")
    if kinds[0] != "response.created" or kinds[-1].removeprefix("response.") not in ENDED:
        raise AssertionError(f"the stream begins and ends with {kinds[0]}, {kinds[-1]}")
    last: Any = event
    found = streamed(parts, ended(last.response).usage.output_tokens)
    if "".join(parts) != last.response.output_text:
        raise AssertionError("the deltas are not the whole text")
    return found


def second_turn(response: Any) -> Any:
    """The items of the answer go back, as objects and as model_dump() makes them."""
    asked = next(item for item in ended(response).output if item.type == "function_call")
    result = {"type": "function_call_output", "call_id": asked.call_id, "output": RESULT}
    seen = {"city": city_of(asked.arguments)}
    for sent in (response.output, [item.model_dump() for item in response.output]):
        history: Any = [{"role": "user", "content": WEATHER}, *sent, result]
        answer = client.responses.create(**GREEDY, tools=[TOOL], input=history)
        seen |= said(ended(answer).output_text)
    return seen


@call
def tools() -> Any:
    return second_turn(client.responses.create(**FORCED))


@call
def tools_streamed() -> Any:
    with client.responses.stream(**FORCED) as events:
        pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        response: Any = events.get_final_response()
    if "".join(pieces) != response.output[-1].arguments:
        raise AssertionError(f"the pieces of the arguments are not the whole: {pieces}")
    return second_turn(response)


@call
def structured() -> Any:
    asked: Any = {**GREEDY, "max_output_tokens": JSON_TOKENS}
    response = client.responses.parse(**asked, input=CAPITAL, text_format=City)
    parsed = response.output_parsed
    return {"parsed": json.loads(parsed.model_dump_json())} if parsed else said("")


@call
def wrong_key() -> Any:
    other = client.with_options(api_key=WRONG_KEY)
    return refused(
        lambda: other.responses.create(**GREEDY, input=CAPITAL),
        openai.AuthenticationError,
        status=401,
    )


@call
def unknown_model() -> Any:
    asked = {**GREEDY, "model": UNKNOWN_MODEL}
    return refused(
        lambda: client.responses.create(**asked, input=CAPITAL), openai.NotFoundError, status=404
    )


@call
def too_long() -> Any:
    return refused(
        lambda: client.responses.create(**GREEDY, input=LONG), openai.BadRequestError, status=400
    )


@call
def stored() -> Any:
    """An answer is kept, continued by its id, read, listed and deleted."""
    first = client.responses.create(**GREEDY, input=CAPITAL, store=True)
    second = client.responses.create(
        **GREEDY, input="And its river?", previous_response_id=first.id, store=True
    )
    if second.usage.input_tokens <= first.usage.input_tokens:
        raise AssertionError("the answer before is not in the prompt")
    read = client.responses.retrieve(first.id)
    if read.output_text != first.output_text:
        raise AssertionError("the kept answer is another")
    items = [item.type for item in client.responses.input_items.list(second.id)]
    client.responses.delete(first.id)
    gone = refused(lambda: client.responses.retrieve(first.id), openai.NotFoundError, status=404)
    return {**said(second.output_text), "items": items, "gone": gone["error"]}


@call
def not_stored() -> Any:
    first = client.responses.create(**GREEDY, input=CAPITAL, store=False)
    return refused(lambda: client.responses.retrieve(first.id), openai.NotFoundError, status=404)


@call
def background() -> Any:
    """Begun, and asked for until it has ended."""
    response = client.responses.create(**GREEDY, input=CAPITAL, background=True, store=True)
    for _ in range(300):
        if response.status not in ("queued", "in_progress"):
            break
        sleep(0.1)
        response = client.responses.retrieve(response.id)
    return said(ended(response).output_text)


@call
def input_tokens() -> Any:
    counted = client.responses.input_tokens.count(model=MODEL, input=CAPITAL)
    answer = client.responses.create(**GREEDY, input=CAPITAL)
    if counted.input_tokens != answer.usage.input_tokens:
        raise AssertionError(f"{counted.input_tokens} is not {answer.usage.input_tokens}")
    return {"input_tokens": counted.input_tokens}


if __name__ == "__main__":
    main()
