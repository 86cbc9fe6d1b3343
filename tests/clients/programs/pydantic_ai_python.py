"""pydantic-ai: agents on its OpenAI models, chat and Responses, and its Anthropic model."""

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
    main,
    refused,
    said,
    streamed,
)
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import (
    ModelAuthenticationError,
    ModelContextWindowExceededError,
    ModelHTTPError,
)
from pydantic_ai.messages import ModelResponse, ToolCallPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.profiles.anthropic import AnthropicModelProfile
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

PROFILES: dict[str, Any] = {
    "messages": {"profile": AnthropicModelProfile(supports_json_schema_output=True)}
}
"""Of a model that it does not know by name, it expects no JSON schemas over Messages."""
DESCRIPTION = GET_WEATHER["function"]["description"]


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


class GetWeather(BaseModel):
    city: str


def agent(
    output: Any = str, *, key: str = KEY, model: str = MODEL, max_tokens: int = MAX_TOKENS
) -> Any:
    kind: Any = OpenAIResponsesModel if API == "responses" else OpenAIChatModel
    provider: Any = OpenAIProvider(base_url=BASE_URL, api_key=key)
    if API == "messages":
        kind, provider = AnthropicModel, AnthropicProvider(base_url=ROOT_URL, api_key=key)
    settings = ModelSettings(temperature=0, max_tokens=max_tokens, timeout=60)
    made = kind(model, provider=provider, **PROFILES.get(API, {}))
    return Agent(made, output_type=output, model_settings=settings)


def forced_once(context: Any) -> ModelSettings:
    """The first turn must call; a tiny model does not always do so by itself."""
    settings = ModelSettings(temperature=0, max_tokens=JSON_TOKENS, timeout=60)
    return {**settings, "tool_choice": "required"} if context.run_step == 1 else settings


def agent_with_tool() -> Any:
    made = agent()
    made.model_settings = forced_once

    @made.tool_plain
    def get_weather(city: str) -> str:
        """Get the weather in a city"""
        return RESULT

    return made


def called(messages: Any) -> dict[str, Any]:
    parts = [part for m in messages if isinstance(m, ModelResponse) for part in m.parts]
    found = [part.args_as_dict() for part in parts if isinstance(part, ToolCallPart)]
    return {"city": found[0]["city"]}


@call
def chat() -> Any:
    return said(agent().run_sync(CAPITAL).output)


@call
async def stream() -> Any:
    async with agent().run_stream(CAPITAL) as answer:
        parts = [part async for part in answer.stream_text(delta=True, debounce_by=None)]
        usage = answer.usage() if callable(answer.usage) else answer.usage
    return streamed(parts, usage.output_tokens)


@call
def tools() -> Any:
    run = agent_with_tool().run_sync(WEATHER)
    return {**called(run.all_messages()), **said(run.output)}


@call
async def tools_streamed() -> Any:
    async with agent_with_tool().run_stream(WEATHER) as answer:
        text = await answer.get_output()
    return {**called(answer.all_messages()), **said(text)}


@call
def structured() -> Any:
    """As its default, an output tool, and as a JSON schema."""
    tool = ToolOutput(GetWeather, name="get_weather", description=DESCRIPTION)
    by_tool = agent(tool, max_tokens=JSON_TOKENS).run_sync(WEATHER).output
    by_schema = agent(NativeOutput(City), max_tokens=JSON_TOKENS).run_sync(CAPITAL).output
    return {"by_tool": by_tool.model_dump(), "by_schema": by_schema.model_dump()}


@call
def wrong_key() -> Any:
    other = agent(key=WRONG_KEY)
    return refused(lambda: other.run_sync(CAPITAL), ModelAuthenticationError, status=401)


@call
def unknown_model() -> Any:
    other = agent(model=UNKNOWN_MODEL)
    return refused(lambda: other.run_sync(CAPITAL), ModelHTTPError, status=404)


@call
def too_long() -> Any:
    asked = agent()
    return refused(lambda: asked.run_sync(LONG), ModelContextWindowExceededError, status=400)


if __name__ == "__main__":
    main()
