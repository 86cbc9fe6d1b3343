"""LiteLLM's own Responses API, which it passes on to the server's."""

from __future__ import annotations

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

import litellm  # isort: skip  # reads the environment that `common` has set

litellm.telemetry = False
litellm.suppress_debug_info = True
TOOLS: Any = [{"type": "function", "strict": False, **WEATHER_TOOL}]
FORCED: Any = {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": JSON_TOKENS}


class City(BaseModel):
    size: Literal[1, 2, 3]
    coastal: bool


def ask(given: Any, *, model: str = MODEL, key: str = KEY, **more: Any) -> Any:
    options: Any = {"temperature": 0, "max_output_tokens": MAX_TOKENS, "num_retries": 0, **more}
    where: Any = {"api_base": BASE_URL, "api_key": key, "timeout": 60}
    return litellm.responses(model=f"openai/{model}", input=given, **where, **options)


def text_of(response: Any) -> str:
    items = [item for item in response.output if item.type == "message"]
    return "".join(part.text for item in items for part in item.content)


@call
def chat() -> Any:
    return said(text_of(ask(CAPITAL)))


@call
def stream() -> Any:
    parts, usage = [], None
    for event in ask(CAPITAL, stream=True):
        if event.type == "response.output_text.delta":
            parts.append(event.delta)
        if event.type in ("response.completed", "response.incomplete"):
            usage = event.response.usage
    return streamed(parts, usage.output_tokens if usage else None)


def second_turn(items: Any) -> Any:
    asked = next(item for item in items if item.type == "function_call")
    result = {"type": "function_call_output", "call_id": asked.call_id, "output": RESULT}
    sent = [item.model_dump() for item in items]
    answer = ask([{"role": "user", "content": WEATHER}, *sent, result], tools=TOOLS)
    return {"city": city_of(asked.arguments), **said(text_of(answer))}


@call
def tools() -> Any:
    return second_turn(ask(WEATHER, **FORCED).output)


@call
def tools_streamed() -> Any:
    events = list(ask(WEATHER, **FORCED, stream=True))
    return second_turn([e.item for e in events if e.type == "response.output_item.done"])


@call
def structured() -> Any:
    answer = ask(CAPITAL, text_format=City, max_output_tokens=JSON_TOKENS)
    return City.model_validate_json(text_of(answer)).model_dump()


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
