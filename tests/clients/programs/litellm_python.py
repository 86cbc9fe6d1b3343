"""LiteLLM, with the provider that stands in front of the model's name: hosted_vllm, openai, or
anthropic, which calls Messages.
"""

from __future__ import annotations

import os
from typing import Any, Literal

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
    ROOT_URL,
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

import litellm  # isort: skip  # reads the environment that `common` has set

litellm.telemetry = False
litellm.suppress_debug_info = True
PROVIDER = os.environ["CLIENT_PROVIDER"]
TOOLS: Any = {"messages": [{"role": "user", "content": WEATHER}], "tools": [GET_WEATHER]}

FORCED: Any = {**TOOLS, "tool_choice": "required", "max_tokens": JSON_TOKENS}


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


def ask(messages: Any, *, model: str = MODEL, key: str = KEY, **more: Any) -> Any:
    options: Any = {"temperature": 0, "max_tokens": MAX_TOKENS, "num_retries": 0, **more}
    where: Any = {
        "api_base": ROOT_URL if PROVIDER == "anthropic" else BASE_URL,
        "api_key": key,
        "timeout": 60,
    }
    return litellm.completion(
        model=f"{PROVIDER}/{model}",
        messages=[{"role": "user", "content": messages}] if isinstance(messages, str) else messages,
        **where,
        **options,
    )


@call
def chat() -> Any:
    return said(ask(CAPITAL).choices[0].message.content)


@call
def stream() -> Any:
    chunks = list(ask(CAPITAL, stream=True, stream_options={"include_usage": True}))
    parts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    return streamed(parts, usages[-1].completion_tokens if usages else None)


def second_turn(message: Any) -> Any:
    asked = message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": asked.id, "content": RESULT}
    seen = {"city": city_of(asked.function.arguments)}
    for sent in (message, message.model_dump()):
        history = [*TOOLS["messages"], sent, result]
        seen |= said(ask(history, tools=TOOLS["tools"]).choices[0].message.content)
    return seen


@call
def tools() -> Any:
    return second_turn(ask(**FORCED).choices[0].message)


@call
def tools_streamed() -> Any:
    chunks = list(ask(**FORCED, stream=True))
    whole: Any = litellm.stream_chunk_builder(chunks, messages=TOOLS["messages"])
    return second_turn(whole.choices[0].message)


@call
def structured() -> Any:
    answer = ask(CAPITAL, response_format=City, max_tokens=JSON_TOKENS)
    return City.model_validate_json(answer.choices[0].message.content).model_dump()


@call
def wrong_key() -> Any:
    return refused(lambda: ask(CAPITAL, key=WRONG_KEY), litellm.AuthenticationError, status=401)


@call
def unknown_model() -> Any:
    return refused(lambda: ask(CAPITAL, model=UNKNOWN_MODEL), litellm.NotFoundError, status=404)


@call
def too_long() -> Any:
    return refused(lambda: ask(LONG), litellm.ContextWindowExceededError, status=400)


if __name__ == "__main__":
    main()
