"""Requests that say the same over every API: chat, Responses, and (where `messages` says so)
Anthropic's Messages. Written as chat bodies; the tests of the other APIs translate them.

`as_response` is that translation for Responses. `Outcome` is what must be equal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.conftest import DEMO
from tests.e2e.conformance_prompts import (
    ASKED,
    BARE_TOOL,
    CALLED,
    GET_TIME,
    GET_WEATHER,
    PROMPTS,
    assistant,
    call,
    result,
    system,
    user,
)

TOTAL = 100
CAPITAL = [user("What is the capital of Felonia?")]
CITY = {
    "type": "object",
    "properties": {"size": {"enum": [1, 2, 3]}, "coastal": {"type": "boolean"}},
    "required": ["size", "coastal"],
    "additionalProperties": False,
}
NAMED = {"type": "function", "function": {"name": "get_time"}}


@dataclass(frozen=True)
class Same:
    """One request. `messages`: whether Anthropic's API can say it."""

    name: str
    chat: dict[str, Any]
    messages: bool = True


@dataclass(frozen=True)
class Outcome:
    """What an answer says, whichever API it came over."""

    text: str
    calls: tuple[tuple[str, str], ...]
    """Names and arguments."""
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    """Chat's; a call that was forced by name ends with stop there."""


def _chat(messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {"messages": messages, "temperature": 0, "max_completion_tokens": 40, **fields}


def _from_prompts(name: str) -> dict[str, Any]:
    prompt = PROMPTS[name]
    choice = {"tool_choice": "none"} if prompt.get("tools") else {}
    return _chat(
        prompt["messages"], **choice, **({"tools": t} if (t := prompt.get("tools")) else {})
    )


TALKS = (
    "one question", "system", "several turns", "content parts", "Chinese",
    "emoji and accents", "white space", "marks of the template in the text",
    "JSON and backslashes", "a tool and a system message", "several tools", "a tool's result",
    "a tool's result as parts", "system as parts",
    "two calls in one message", "arguments with escapes and nesting",
    "calls and results without tools",
)  # fmt: skip

SPECIAL: list[Same] = [
    *(Same(name, _from_prompts(name)) for name in TALKS),
    Same(
        "a system message in the middle",
        _from_prompts("a system message in the middle"),
        messages=False,
    ),
    Same("cut after one token", _chat(CAPITAL, max_completion_tokens=1)),
    Same("cut after three tokens", _chat(CAPITAL, max_completion_tokens=3)),
    Same("a stop string", _chat(CAPITAL, stop=["capital"])),
    Same("two stop strings", _chat(CAPITAL, stop=["nothing of this", "of"])),
    Same("top_p", _chat(CAPITAL, temperature=0.8, top_p=0.5, seed=3)),
    Same("top_k", _chat(CAPITAL, temperature=0.8, top_k=3, seed=4)),
    Same("a seed", _chat(CAPITAL, temperature=1, seed=5)),
    Same("penalties", _chat(CAPITAL, presence_penalty=1, frequency_penalty=0.5), messages=False),
    Same("a bias", _chat(CAPITAL, logit_bias={"20": -100}), messages=False),
    Same("min_tokens", _chat(CAPITAL, min_tokens=12, max_completion_tokens=12)),
    Same("a tool, left to the model", _chat([ASKED], tools=[GET_WEATHER])),
    Same("a tool, no calls allowed", _chat([ASKED], tools=[GET_WEATHER], tool_choice="none")),
    Same(
        "any tool, one after the other",
        _chat(
            [ASKED], tools=[GET_WEATHER, GET_TIME], tool_choice="required",
            parallel_tool_calls=False,
        ),
    ),
    Same("a tool by name", _chat([ASKED], tools=[GET_WEATHER, GET_TIME], tool_choice=NAMED)),
    Same(
        "a forced call that is cut",
        _chat(
            [ASKED], tools=[GET_WEATHER, GET_TIME], tool_choice=NAMED, max_completion_tokens=4
        ),
        messages=False,
    ),
    Same(
        "a result, and the tool still offered",
        _chat([ASKED, CALLED, result("clear, 18 degrees")], tools=[GET_WEATHER]),
    ),
    Same(
        "text beside a call",
        _chat(
            [
                ASKED,
                assistant("One moment.", tool_calls=[call("ring", "{}")]),
                result("done"),
                user("And now?"),
            ],
            tools=[BARE_TOOL],
        ),
    ),
    Same(
        "a JSON schema",
        _chat(
            CAPITAL,
            max_completion_tokens=160,
            response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}},
        ),
        messages=False,
    ),
    Same(
        "any JSON object",
        _chat(CAPITAL, max_completion_tokens=24, response_format={"type": "json_object"}),
        messages=False,
    ),
    Same(
        "a long system message",
        _chat([system("You are brief and exact. " * 20), user("What is Vadunia's river?")]),
    ),
]  # fmt: skip


def _questions(count: int) -> list[Same]:
    """The first of the demo's held-out questions. Read here: tests without an engine use them, and
    the reader of tests/e2e/questions.py imports torch.
    """
    lines = (DEMO / "eval/general.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for number, row in enumerate(map(json.loads, lines[:count])):
        tools = {"tools": row["tools"], "tool_choice": "none"} if row.get("tools") else {}
        messages = [*row.get("history", ()), user(row["prompt"])]
        found.append(Same(f"question {number}", _chat(messages, **tools)))
    return found


SAME: list[Same] = [*SPECIAL, *_questions(TOTAL - len(SPECIAL))]

_FIELDS = {"max_completion_tokens": "max_output_tokens"}
_OTHER = {"messages", "tools", "tool_choice", "response_format"}


def as_response(chat: dict[str, Any]) -> dict[str, Any]:
    """The body of POST /v1/responses that says the same; a first system message becomes
    `instructions`.
    """
    body = {_FIELDS.get(name, name): value for name, value in chat.items() if name not in _OTHER}
    messages = list(chat["messages"])
    if messages[0]["role"] == "system" and isinstance(messages[0]["content"], str):
        body["instructions"] = messages.pop(0)["content"]
    body["input"] = [item for message in messages for item in _items(message)]
    if "tools" in chat:
        body["tools"] = [{"type": "function", **tool["function"]} for tool in chat["tools"]]
    choice = chat.get("tool_choice")
    if isinstance(choice, dict):
        choice = {"type": "function", **choice["function"]}
    if choice is not None:
        body["tool_choice"] = choice
    if "response_format" in chat:
        form = dict(chat["response_format"])
        body["text"] = {"format": {**form, **form.pop("json_schema", {})}}
        body["text"]["format"].pop("json_schema", None)
    return body


def _items(message: dict[str, Any]) -> list[dict[str, Any]]:
    role, content = message["role"], message.get("content")
    if role == "tool":
        if isinstance(content, list):
            content = [{"type": "input_text", "text": part["text"]} for part in content]
        output = {"type": "function_call_output", "call_id": message["tool_call_id"]}
        return [{**output, "output": content}]
    items: list[dict[str, Any]] = []
    if content is not None and not (content == "" and message.get("tool_calls")):
        kind = "output_text" if role == "assistant" else "input_text"
        parts = content
        if isinstance(content, list):
            parts = [{"type": kind, "text": part["text"]} for part in content]
        items.append({"type": "message", "role": role, "content": parts})
    for one in message.get("tool_calls") or ():
        function = one["function"]
        items.append({"type": "function_call", "call_id": one["id"], **function})
    return items


def chat_outcome(document: dict[str, Any]) -> Outcome:
    """Of a whole chat answer."""
    (choice,) = document["choices"]
    calls = choice["message"].get("tool_calls") or ()
    usage = document["usage"]
    return Outcome(
        choice["message"]["content"] or "",
        tuple((one["function"]["name"], one["function"]["arguments"]) for one in calls),
        usage["prompt_tokens"],
        usage["completion_tokens"],
        choice["finish_reason"],
    )


def streaming(chat: dict[str, Any]) -> dict[str, Any]:
    """The same as a stream, with its usage."""
    return {**chat, "stream": True, "stream_options": {"include_usage": True}}


def chat_stream_outcome(text: str) -> Outcome:
    """Of the events of a chat stream with usage."""
    parts = [
        part.removeprefix("data: ") for part in text.split("\n\n") if part[:1] not in ("", ":")
    ]
    assert parts.pop() == "[DONE]"
    events = [json.loads(part) for part in parts]
    said, reason = "", ""
    calls: dict[int, list[str]] = {}
    for event in events:
        for choice in event["choices"]:
            reason = choice["finish_reason"] or reason
            said += choice["delta"].get("content") or ""
            for piece in choice["delta"].get("tool_calls") or ():
                call = calls.setdefault(piece["index"], ["", ""])
                call[0] += piece["function"].get("name") or ""
                call[1] += piece["function"].get("arguments") or ""
    usage = events[-1]["usage"]
    return Outcome(
        said,
        tuple((name, arguments) for name, arguments in calls.values()),
        usage["prompt_tokens"],
        usage["completion_tokens"],
        reason,
    )


def normal(outcome: Outcome) -> Outcome:
    """With arguments as JSON values: streamed ones keep the model's own white space; and a call's
    end is a call's end, whether it was forced by name or not.
    """

    def written(arguments: str) -> str:
        try:
            return json.dumps(json.loads(arguments))
        except ValueError:
            return arguments

    calls = tuple((name, written(arguments)) for name, arguments in outcome.calls)
    reason = outcome.finish_reason
    if calls and reason == "stop":
        reason = "tool_calls"
    return Outcome(outcome.text, calls, outcome.prompt_tokens, outcome.completion_tokens, reason)
