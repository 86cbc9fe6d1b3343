"""smolagents' OpenAIModel, and a step of its memory as an agent sends it back."""

from __future__ import annotations

from typing import Any

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
    WRONG_KEY,
    call,
    city_of,
    main,
    refused,
    said,
    streamed,
)
from smolagents import ActionStep, ChatMessage, OpenAIModel, tool
from smolagents.memory import ToolCall
from smolagents.models import MessageRole
from smolagents.monitoring import Timing

CITY = {
    "type": "object",
    "properties": {"size": {"enum": [1, 2, 3]}, "coastal": {"type": "boolean"}},
    "required": ["size", "coastal"],
    "additionalProperties": False,
}


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city

    Args:
        city: the city's name
    """
    return RESULT


def model(name: str = MODEL, key: str = KEY, max_tokens: int = MAX_TOKENS) -> OpenAIModel:
    return OpenAIModel(
        name, api_base=BASE_URL, api_key=key, temperature=0, max_tokens=max_tokens,
        client_kwargs={"max_retries": 0, "timeout": 60}, retry=False,
    )  # fmt: skip


def user(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": text}])


@call
def chat() -> Any:
    return said(model().generate([user(CAPITAL)]).content)


@call
def stream() -> Any:
    deltas = list(model().generate_stream([user(CAPITAL)]))
    tokens = [delta.token_usage.output_tokens for delta in deltas if delta.token_usage]
    return streamed([delta.content or "" for delta in deltas], max(tokens, default=None))


@call
def tools() -> Any:
    """What an agent's memory makes of a step, and the message itself with the tool's result."""
    llm = model(max_tokens=JSON_TOKENS)
    first = llm.generate([user(WEATHER)], tools_to_call_from=[get_weather])
    asked = (first.tool_calls or [])[0]
    arguments = asked.function.arguments
    step = ActionStep(
        step_number=1,
        timing=Timing(0.0, 1.0),
        tool_calls=[ToolCall(asked.function.name, arguments, asked.id)],
        model_output=str(first.content or ""),
        observations=RESULT,
    )
    history = [user(WEATHER), *step.to_messages()]
    second = llm.generate(history)
    return {"city": city_of(arguments), **said(second.content)}


@call
def structured() -> Any:
    schema = {"name": "city", "schema": CITY, "strict": True}
    kind = {"type": "json_schema", "json_schema": schema}
    text = model(max_tokens=JSON_TOKENS).generate([user(CAPITAL)], response_format=kind).content
    import json

    return json.loads(str(text))


@call
def wrong_key() -> Any:
    other = model(key=WRONG_KEY)
    return refused(lambda: other.generate([user(CAPITAL)]), openai.AuthenticationError, status=401)


@call
def unknown_model() -> Any:
    other = model(UNKNOWN_MODEL)
    return refused(lambda: other.generate([user(CAPITAL)]), openai.NotFoundError, status=404)


@call
def too_long() -> Any:
    return refused(lambda: model().generate([user(LONG)]), openai.BadRequestError, status=400)


if __name__ == "__main__":
    main()
