"""OpenAI's Agents SDK on chat completions, and on its default, Responses."""

from __future__ import annotations

from typing import Any, Literal

import openai
from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from agents.models.openai_responses import OpenAIResponsesModel
from common import (
    API,
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
    city_of,
    main,
    refused,
    said,
    streamed,
)
from pydantic import BaseModel

set_tracing_disabled(True)


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


@function_tool
def get_weather(city: str) -> str:
    """Get the weather in a city"""
    return RESULT


def agent(
    *,
    key: str = KEY,
    model: str = MODEL,
    max_tokens: int = MAX_TOKENS,
    choice: str | None = None,
    **more: Any,
) -> Agent[Any]:
    client = openai.AsyncOpenAI(base_url=BASE_URL, api_key=key, max_retries=0, timeout=60)
    kind = OpenAIResponsesModel if API == "responses" else OpenAIChatCompletionsModel
    settings = ModelSettings(
        temperature=0, max_tokens=max_tokens, include_usage=True, tool_choice=choice
    )
    return Agent(
        name="clerk",
        model=kind(model=model, openai_client=client),
        model_settings=settings,
        **more,
    )


FORCED: Any = {"tools": [get_weather], "choice": "required", "max_tokens": JSON_TOKENS}
"""The SDK itself forces the first turn alone."""


def called(items: Any) -> dict[str, Any]:
    found = [item.raw_item.arguments for item in items if item.type == "tool_call_item"]
    return {"city": city_of(found[0])}


@call
def chat() -> Any:
    return said(Runner.run_sync(agent(), CAPITAL).final_output)


@call
async def stream() -> Any:
    running = Runner.run_streamed(agent(), CAPITAL)
    parts = [
        event.data.delta
        async for event in running.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    return streamed(parts, running.context_wrapper.usage.output_tokens)


@call
def tools() -> Any:
    run = Runner.run_sync(agent(**FORCED), WEATHER, max_turns=3)
    return {**called(run.new_items), **said(run.final_output)}


@call
async def tools_streamed() -> Any:
    running = Runner.run_streamed(agent(**FORCED), WEATHER, max_turns=3)
    async for _ in running.stream_events():
        pass
    return {**called(running.new_items), **said(running.final_output)}


@call
def structured() -> Any:
    run = Runner.run_sync(agent(output_type=City, max_tokens=JSON_TOKENS), CAPITAL)
    return run.final_output_as(City).model_dump()


@call
def wrong_key() -> Any:
    other = agent(key=WRONG_KEY)
    return refused(lambda: Runner.run_sync(other, CAPITAL), openai.AuthenticationError, status=401)


@call
def unknown_model() -> Any:
    other = agent(model=UNKNOWN_MODEL)
    return refused(lambda: Runner.run_sync(other, CAPITAL), openai.NotFoundError, status=404)


@call
def too_long() -> Any:
    return refused(lambda: Runner.run_sync(agent(), LONG), openai.BadRequestError, status=400)


if __name__ == "__main__":
    main()
