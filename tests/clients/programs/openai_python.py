"""The official Python client."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from common import (
    BASE_URL,
    CAPITAL,
    GET_WEATHER,
    JSON_TOKENS,
    KEY,
    LONG,
    MAX_TOKENS,
    MODEL,
    RESULT,
    UNKNOWN_MODEL,
    WEATHER,
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
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_completion_tokens": MAX_TOKENS}
ASKED: Any = [{"role": "user", "content": CAPITAL}]
TOOLS: Any = {"messages": [{"role": "user", "content": WEATHER}], "tools": [GET_WEATHER]}


FORCED: Any = {**GREEDY, **TOOLS, "tool_choice": "required", "max_completion_tokens": JSON_TOKENS}


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


@call
def chat() -> Any:
    return said(client.chat.completions.create(**GREEDY, messages=ASKED).choices[0].message.content)


@call
def stream() -> Any:
    parts, tokens = [], None
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(**GREEDY, messages=ASKED, **options):
        parts += [choice.delta.content or "" for choice in chunk.choices]
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return streamed(parts, tokens)


def second_turn(message: Any) -> Any:
    """The assistant's message goes back as it came: as an object, or as model_dump() makes it."""
    asked = message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": asked.id, "content": RESULT}
    seen = {"city": city_of(asked.function.arguments)}
    for sent in (message, message.model_dump()):
        history = [*TOOLS["messages"], sent, result]
        answer = client.chat.completions.create(**GREEDY, **{**TOOLS, "messages": history})
        seen |= said(answer.choices[0].message.content)
    return seen


@call
def tools() -> Any:
    first = client.chat.completions.create(**FORCED)
    return second_turn(first.choices[0].message)


@call
def tools_streamed() -> Any:
    """The stream helper puts the deltas together, `index` and `parsed_arguments` among them."""
    with client.chat.completions.stream(**FORCED) as parts:
        message = parts.get_final_completion().choices[0].message
    return second_turn(message)


@call
def structured() -> Any:
    options: Any = {**GREEDY, "max_completion_tokens": JSON_TOKENS, "response_format": City}
    parsed = client.chat.completions.parse(**options, messages=ASKED).choices[0].message.parsed
    return {"parsed": json.loads(parsed.model_dump_json())} if parsed else said("")


@call
def wrong_key() -> Any:
    other = client.with_options(api_key=WRONG_KEY)
    return refused(
        lambda: other.chat.completions.create(**GREEDY, messages=ASKED),
        openai.AuthenticationError,
        status=401,
    )


@call
def unknown_model() -> Any:
    asked = {**GREEDY, "model": UNKNOWN_MODEL}
    return refused(
        lambda: client.chat.completions.create(**asked, messages=ASKED),
        openai.NotFoundError,
        status=404,
    )


@call
def too_long() -> Any:
    history: Any = [{"role": "user", "content": LONG}]
    return refused(
        lambda: client.chat.completions.create(**GREEDY, messages=history),
        openai.BadRequestError,
        status=400,
    )


@call
def error_words() -> Any:
    """`error.type` and `error.code` are OpenAI's, which other clients decide by."""
    long: Any = [{"role": "user", "content": LONG}]
    asked = {
        "invalid_api_key": lambda: client.with_options(api_key=WRONG_KEY).models.list(),
        "model_not_found": lambda: client.chat.completions.create(
            **{**GREEDY, "model": UNKNOWN_MODEL}, messages=ASKED
        ),
        "context_length_exceeded": lambda: client.chat.completions.create(**GREEDY, messages=long),
    }
    found = {}
    for code, ask in asked.items():
        try:
            ask()
        except openai.APIStatusError as error:
            found[code] = (error.type, error.code)
    wanted = {code: ("invalid_request_error", code) for code in asked}
    if found != wanted:
        raise AssertionError(f"(type, code) for each: {found}")
    return found


@call
def models() -> Any:
    names = [model.id for model in client.models.list()]
    if MODEL not in names:
        raise AssertionError(f"{MODEL} is not among {names}")
    return {"models": names}


@call
def model() -> Any:
    return {"model": client.models.retrieve(MODEL).id}


@call
def completions() -> Any:
    prompt = "The capital of Felonia is"
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12)
    return said(answer.choices[0].text)


if __name__ == "__main__":
    main()
