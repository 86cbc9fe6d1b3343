"""Simon Willison's `llm`, with a model as extra-openai-models.yaml makes one."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Literal

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
    WRONG_KEY,
    call,
    main,
    refused,
    said,
    streamed,
)
from pydantic import BaseModel

os.environ["LLM_USER_PATH"] = tempfile.mkdtemp(prefix="packhorse-llm-")  # not the user's own

import llm
import openai
from llm.default_plugins.openai_models import Chat


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


def model(name: str = MODEL, kind: type[Chat] = Chat) -> Any:
    return kind(
        "demo", model_name=name, api_base=BASE_URL, supports_schema=True, supports_tools=True
    )


def get_weather(city: str) -> str:
    """Get the weather in a city"""
    return RESULT


class Forced(Chat):
    """The first turn must call; `llm` leaves that to the model, and a tiny one does not always."""

    def build_kwargs(self, prompt: Any, stream: bool) -> dict[str, Any]:
        built: dict[str, Any] = super().build_kwargs(prompt, stream)
        return built if prompt.tool_results else {**built, "tool_choice": "required"}


OPTIONS: Any = {"temperature": 0, "max_tokens": MAX_TOKENS}


def ask(prompt: str, *, name: str = MODEL, key: str = KEY) -> str:
    return str(model(name).prompt(prompt, key=key, stream=False, **OPTIONS).text())


@call
def chat() -> Any:
    return said(ask(CAPITAL))


@call
def stream() -> Any:
    answer = model().prompt(CAPITAL, key=KEY, **OPTIONS)
    parts = list(answer)
    return streamed(parts, answer.usage().output)


@call
def tools() -> Any:
    options = {"temperature": 0, "max_tokens": JSON_TOKENS}
    chain = model(kind=Forced).chain(
        WEATHER,
        tools=[get_weather],
        key=KEY,
        stream=False,
        options=options,
    )
    text = chain.text()
    asked = [found for part in chain._responses for found in part.tool_calls()]
    return {"city": asked[0].arguments["city"], **said(text)}


@call
def tools_streamed() -> Any:
    options = {"temperature": 0, "max_tokens": JSON_TOKENS}
    chain = model(kind=Forced).chain(WEATHER, tools=[get_weather], key=KEY, options=options)
    text = chain.text()
    asked = [found for part in chain._responses for found in part.tool_calls()]
    return {"city": asked[0].arguments["city"], **said(text)}


@call
def structured() -> Any:
    options: Any = {"temperature": 0, "max_tokens": JSON_TOKENS}
    text = model().prompt(CAPITAL, schema=City, key=KEY, stream=False, **options).text()
    return City.model_validate_json(text).model_dump()


KINDS = (llm.ModelError, openai.APIStatusError)


@call
def wrong_key() -> Any:
    return refused(lambda: ask(CAPITAL, key=WRONG_KEY), *KINDS, status=401)


@call
def unknown_model() -> Any:
    return refused(lambda: ask(CAPITAL, name=UNKNOWN_MODEL), *KINDS, status=404)


@call
def too_long() -> Any:
    return refused(lambda: ask(LONG), *KINDS, status=400)


if __name__ == "__main__":
    main()
