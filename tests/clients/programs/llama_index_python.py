"""LlamaIndex's OpenAILike."""

from __future__ import annotations

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
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict

ASKED = [ChatMessage(role=MessageRole.USER, content=CAPITAL)]
SKY = [ChatMessage(role=MessageRole.USER, content=WEATHER)]


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


def get_weather(city: str) -> str:
    """Get the weather in a city"""
    return RESULT


class Arguments(BaseModel):
    """As the demo model was trained on them: without titles."""

    model_config = ConfigDict(json_schema_extra=lambda schema: _without_titles(schema))

    city: str


def _without_titles(schema: dict[str, Any]) -> None:
    for part in schema["properties"].values():
        part.pop("title", None)


TOOL = FunctionTool.from_defaults(
    get_weather, description=GET_WEATHER["function"]["description"], fn_schema=Arguments
)


def model(name: str = MODEL, key: str = KEY, max_tokens: int = MAX_TOKENS) -> OpenAILike:
    return OpenAILike(
        model=name, api_base=BASE_URL, api_key=key, temperature=0, max_tokens=max_tokens,
        is_chat_model=True, is_function_calling_model=True, context_window=2048, max_retries=0,
        should_use_structured_outputs=True, strict=True, timeout=60,
    )  # fmt: skip


@call
def chat() -> Any:
    return said(model().chat(ASKED).message.content)


@call
def stream() -> Any:
    parts, tokens = [], None
    for part in model().stream_chat(ASKED, stream_options={"include_usage": True}):
        parts.append(part.delta or "")
        usage = getattr(part.raw, "usage", None)
        tokens = usage.completion_tokens if usage else tokens
    return streamed(parts, tokens)


def second_turn(answer: Any) -> Any:
    llm = model()
    asked = llm.get_tool_calls_from_response(answer)[0]
    kept = {"tool_call_id": asked.tool_id}
    result = ChatMessage(role=MessageRole.TOOL, content=RESULT, additional_kwargs=kept)
    history = [*SKY, answer.message, result]
    last = llm.chat_with_tools([TOOL], chat_history=history)
    return {"city": city_of(asked.tool_kwargs), **said(last.message.content)}


@call
def tools() -> Any:
    return second_turn(
        model(max_tokens=JSON_TOKENS).chat_with_tools([TOOL], chat_history=SKY, tool_required=True)
    )


@call
def tools_streamed() -> Any:
    asked = model(max_tokens=JSON_TOKENS).stream_chat_with_tools(
        [TOOL], chat_history=SKY, tool_required=True
    )
    return second_turn(list(asked)[-1])


@call
def structured() -> Any:
    found = model(max_tokens=JSON_TOKENS).as_structured_llm(City).chat(ASKED).raw
    return City.model_validate(found).model_dump()


@call
def wrong_key() -> Any:
    other = model(key=WRONG_KEY)
    return refused(lambda: other.chat(ASKED), openai.AuthenticationError, status=401)


@call
def unknown_model() -> Any:
    other = model(UNKNOWN_MODEL)
    return refused(lambda: other.chat(ASKED), openai.NotFoundError, status=404)


@call
def too_long() -> Any:
    asked = [ChatMessage(role=MessageRole.USER, content=LONG)]
    return refused(lambda: model().chat(asked), openai.BadRequestError, status=400)


if __name__ == "__main__":
    main()
