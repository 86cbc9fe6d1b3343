"""What the Python programs of this folder share: the questions, and one JSON line for each call.

A program is called as `python NAME.py BASE_URL MODEL KEY CALL...`, where BASE_URL ends in /v1. It
prints {"call", "ok", "seen"} for each call, or {"call", "ok": false, "error"} with what its library
said. Needs nothing but the standard library, so that it runs in every environment.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

# Nothing but the server under test is spoken to.
os.environ.update(
    LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_MODE="PRODUCTION", DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1", LANGSMITH_TRACING="false", OPENAI_AGENTS_DISABLE_TRACING="1",
    PYDANTIC_DISABLE_PLUGINS="__all__",
)  # fmt: skip
warnings.simplefilter("ignore")

BASE_URL, MODEL, KEY = sys.argv[1:4]
ROOT_URL = BASE_URL.removesuffix("/v1")
"""Anthropic's clients write `/v1` themselves."""
API = os.environ.get("CLIENT_API", "chat")
"""For programs whose library speaks several: `chat`, `responses`, `messages`."""
WRONG_KEY = "sk-a-key-that-nobody-has-given-out"
UNKNOWN_MODEL = "no-such-model"
CAPITAL = "What is the capital of Felonia?"
WEATHER = "What is the weather in Nemoburg?"
RESULT = "clear, 18 degrees"
LONG = "The capital of Felonia is a town on the river. " * 500
"""Above the demo model's 2048 tokens, whatever the tokenizer."""
MAX_TOKENS = 60
JSON_TOKENS = 500
"""Enough for a small object with bounded white space between all its parts."""
WEATHER_TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
"""As each API wraps it: chat in `function`, responses flat, messages as `input_schema`."""
GET_WEATHER: dict[str, Any] = {"type": "function", "function": WEATHER_TOOL}

Call = Callable[[], Any]
calls: dict[str, Call] = {}


def call(function: Call) -> Call:
    """Register a call under its function's name."""
    calls[function.__name__] = function
    return function


def said(text: Any) -> dict[str, Any]:
    """An answer that has text."""
    if not (isinstance(text, str) and text.strip()):
        raise AssertionError(f"no text in the answer: {text!r}")
    return {"text": text[:60]}


def streamed(parts: list[str], completion_tokens: int | None) -> dict[str, Any]:
    """A stream of more than one part that ended with its usage."""
    if len([part for part in parts if part]) < 2:
        raise AssertionError(f"not streamed: {parts!r}")
    if not completion_tokens:
        raise AssertionError("no usage came with the stream")
    return {**said("".join(parts)), "parts": len(parts), "completion_tokens": completion_tokens}


def city_of(arguments: Any) -> str:
    """The argument of get_weather, as text or read by the library."""
    read = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
    return str(read["city"])


def statuses_of(error: BaseException) -> list[int]:
    """The HTTP statuses that an exception, or what caused it, knows."""
    found = []
    cause: BaseException | None = error
    while cause is not None and len(found) < 8:
        status = getattr(cause, "status_code", None)
        if isinstance(status, int):
            found.append(status)
        cause = cause.__cause__ or cause.__context__
    return found


def refused(run: Call, *kinds: type[BaseException], status: int) -> dict[str, Any]:
    """The call is refused with the library's own exception for it, and with that HTTP status."""
    try:
        run()
    except kinds as error:
        if status not in statuses_of(error):
            raise AssertionError(f"not {status}: {told(error)}") from error
        code = getattr(error, "code", None)
        return {"error": type(error).__name__, "code": code, "message": str(error)[:300]}
    except Exception as error:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise AssertionError(f"not {names}: {told(error)}") from error
    raise AssertionError(f"not refused; {status} is expected")


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {re.sub(chr(10), ' ', str(error))[:700]}"


def main() -> None:
    """Run the calls that were named, in one process: imports take longer than calls."""
    for name in sys.argv[4:]:
        line: dict[str, Any] = {"call": name}
        try:
            seen = calls[name]()
            if inspect.iscoroutine(seen):
                seen = asyncio.run(seen)
            line |= {"ok": True, "seen": seen}
        except Exception as error:  # noqa: BLE001  # what a library raises is what is looked at
            line |= {"ok": False, "error": told(error)}
        print(json.dumps(line, default=str), flush=True)  # noqa: T201  # it is the result
