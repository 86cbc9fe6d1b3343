"""LangChain's ChatOpenAI, on chat completions or Responses, and its ChatAnthropic."""

from __future__ import annotations

from typing import Any, Literal

from common import (
    API,
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
from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAuthenticationError,
    ModelNotFoundError,
)
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


def model(name: str = MODEL, key: str = KEY, max_tokens: int = MAX_TOKENS) -> Any:
    options: Any = {
        "model": name, "max_tokens": max_tokens, "stream_usage": True, "api_key": SecretStr(key),
        "temperature": 0, "max_retries": 0, "timeout": 60,
    }  # fmt: skip
    if API == "messages":
        return ChatAnthropic(base_url=ROOT_URL, **options)
    return ChatOpenAI(base_url=BASE_URL, use_responses_api=API == "responses", **options)


@call
def chat() -> Any:
    return said(model().invoke(CAPITAL).text)


@call
def stream() -> Any:
    chunks = list(model().stream(CAPITAL))
    tokens = [c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata]
    return streamed([str(chunk.text) for chunk in chunks], max(tokens, default=None))


def second_turn(first: Any) -> Any:
    asked = first.tool_calls[0]
    history = [HumanMessage(WEATHER), first, ToolMessage(RESULT, tool_call_id=asked["id"])]
    return {"city": city_of(asked["args"]), **said(bound("auto").invoke(history).text)}


def bound(choice: str) -> Any:
    return model(max_tokens=JSON_TOKENS).bind_tools([GET_WEATHER], tool_choice=choice)


@call
def tools() -> Any:
    return second_turn(bound("any").invoke([HumanMessage(WEATHER)]))


@call
def tools_streamed() -> Any:
    whole: Any = None
    for chunk in bound("any").stream([HumanMessage(WEATHER)]):
        whole = chunk if whole is None else whole + chunk
    return second_turn(whole)


@call
def structured() -> Any:
    found = model(max_tokens=JSON_TOKENS).with_structured_output(City).invoke(CAPITAL)
    return City.model_validate(found).model_dump()


@call
def wrong_key() -> Any:
    return refused(
        lambda: model(key=WRONG_KEY).invoke(CAPITAL), ModelAuthenticationError, status=401
    )


@call
def unknown_model() -> Any:
    return refused(lambda: model(UNKNOWN_MODEL).invoke(CAPITAL), ModelNotFoundError, status=404)


@call
def too_long() -> Any:
    return refused(lambda: model().invoke(LONG), ContextOverflowError, status=400)


if __name__ == "__main__":
    main()
