"""One answer as items: put together from chunks, with the events that stream it on the way.

A whole answer goes the same way, as one chunk. An event is its type and its fields; its number and
its bytes are the protocol's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from packhorse.serve.api.generate import CollectedChoice
from packhorse.serve.api.logprobs import LogprobOptions, ReportedLogprob
from packhorse.serve.api.responses.body import ResponseBody
from packhorse.serve.api.responses.tools import OfferedTool, ToolPlan, custom_input
from packhorse.serve.errors import ErrorKind, ServeError
from packhorse.serve.messages import Chunk, EffectiveSampling, ToolCall, Usage

Event = tuple[str, dict[str, Any]]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
# OpenAI's codes of a failed response; what is not here is server_error.
CODES = {ErrorKind.OVERLOADED: "rate_limit_exceeded", ErrorKind.INVALID: "invalid_prompt"}
# Those that end a stream.
FINAL: dict[str, str] = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "failed": "response.failed",
}


@dataclass(slots=True)
class _Item:
    """An item of the output while it is written."""

    kind: Literal["message", "reasoning", "function_call", "custom_tool_call"]
    id: str
    index: int
    call: ToolCall | None = None
    tool: OfferedTool | None = None
    texts: list[str] = field(default_factory=list)
    logprobs: list[ReportedLogprob] = field(default_factory=list)
    status: str = "in_progress"

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Answer:
    """A response from its request to its end."""

    def __init__(
        self,
        body: ResponseBody,
        plan: ToolPlan,
        response_hex: str,
        *,
        created_s: float | None = None,
    ) -> None:
        """`response_hex` is 32 hexadecimal digits, which the ids of the items have, too."""
        self.id = f"resp_{response_hex}"
        self.status: Status = "in_progress"
        self.usage: Usage | None = None
        self._hex = response_hex
        self._tools = {tool.flat: tool for tool in plan.offered}
        self._options = LogprobOptions(body.top_logprobs or 0)
        self._has_logprobs = body.wants_logprobs
        self._frame = _frame(body, self.id, created_s or time.time())
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._of_call: dict[int, _Item] = {}
        self._logprobs: list[ReportedLogprob] = []  # of tokens whose text has not come
        self._error: ServeError | None = None
        self._completed_s: int | None = None

    def begin(self, model: str, sampling: EffectiveSampling | None) -> None:
        """The model that answers is known, and what its defaults have become."""
        self._frame["model"] = model
        if sampling is not None:
            self._frame["temperature"] = float(sampling.temperature)
            self._frame["top_p"] = float(sampling.top_p)

    @property
    def open_text(self) -> tuple[str, int, list[str]] | None:
        """The message that is being written: its id, its place in the output, its texts so far."""
        item = self._open
        if item is None or item.kind != "message":
            return None
        return item.id, item.index, item.texts

    def opening(self, *, status: Status = "in_progress") -> list[Event]:
        """The events before the first chunk."""
        self.status = status
        fields = {"response": self.document()}
        return [("response.created", fields), ("response.in_progress", fields)]

    def add(self, chunk: Chunk) -> list[Event]:
        """The events of a chunk. The last one closes what is open; `ending` comes after it."""
        events: list[Event] = []
        if self._has_logprobs and chunk.logprobs is not None:
            self._logprobs += self._options.reported(chunk.logprobs)
        calls = list(chunk.tool_calls)
        # The rest of a call that is open: text of the same chunk would close it.
        while calls and self._open is not None and self._open is self._of_call.get(calls[0].index):
            self._add_call(calls.pop(0), events)
        if chunk.reasoning:
            item = self._current("reasoning", events)
            item.texts.append(chunk.reasoning)
            events.append(self._delta("response.reasoning_text.delta", item, chunk.reasoning))
        if chunk.text:
            item = self._current("message", events)
            item.texts.append(chunk.text)
            told = self._taken_logprobs(item)
            kind, fields = self._delta("response.output_text.delta", item, chunk.text)
            events.append((kind, {**fields, "logprobs": _short(told)}))
        for piece in calls:
            self._add_call(piece, events)
        if chunk.finish_reason is not None:
            self._end(chunk.finish_reason, events)
        return events

    def add_whole(self, choice: CollectedChoice) -> None:
        """All of an answer that was not streamed."""
        self.add(
            Chunk(
                choice.text,
                (),
                choice.finish_reason,
                reasoning="".join(choice.reasoning) or None,
                tool_calls=tuple(choice.tool_calls),
                logprobs=None if choice.logprobs is None else tuple(choice.logprobs),
            )
        )

    def fail(self, error: ServeError) -> None:
        """It ends like this."""
        self._close_all("incomplete", [])
        self.status, self._error = "failed", error

    def cancel(self) -> None:
        self._close_all("incomplete", [])
        self.status = "cancelled"

    def ending(self) -> Event:
        """The last event of a stream."""
        return FINAL[self.status], {"response": self.document()}

    def document(self) -> dict[str, Any]:
        """The response as it is now."""
        error = None
        if self._error is not None:
            code = CODES.get(self._error.kind, "server_error")
            error = {"code": code, "message": self._error.message}
        cut = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            **self._frame,
            "status": self.status,
            "completed_at": self._completed_s,
            "error": error,
            "incomplete_details": cut,
            "output": [self._document(item) for item in self._items],
            "usage": None if self.usage is None else usage_document(self.usage),
        }

    # Items

    def _current(self, kind: Literal["message", "reasoning"], events: list[Event]) -> _Item:
        """The open item, if it is of this kind; else a new one."""
        item = self._open
        if item is not None and item.kind == kind:
            return item
        self._close_all("completed", events)
        prefix, part = ("msg", "output_text") if kind == "message" else ("rs", "reasoning_text")
        item = self._new(_Item(kind, self._made_id(prefix), len(self._items)), events)
        empty: dict[str, Any] = {"type": part, "text": ""}
        if kind == "message":
            empty |= {"annotations": [], "logprobs": []}
        events.append(("response.content_part.added", {**_place(item), "part": empty}))
        return item

    def _made_id(self, prefix: str) -> str:
        return f"{prefix}_{self._hex}_{len(self._items)}"

    def _new(self, item: _Item, events: list[Event]) -> _Item:
        document = self._document(item)
        if item.kind in ("message", "reasoning"):
            document["content"] = []  # its part is added by an event of its own
        self._items.append(item)
        self._open = item
        fields = {"output_index": item.index, "item": document}
        events.append(("response.output_item.added", fields))
        return item

    def _add_call(self, piece: ToolCall, events: list[Event]) -> None:
        item = self._of_call.get(piece.index)
        if item is None:
            self._close_all("completed", events)
            tool = self._tools.get(piece.name or "")
            is_custom = tool is not None and tool.kind == "custom"
            item = _Item(
                "custom_tool_call" if is_custom else "function_call",
                self._made_id("ctc" if is_custom else "fc"),
                len(self._items),
                piece,
                tool,
            )
            self._of_call[piece.index] = self._new(item, events)
        if piece.arguments:
            item.texts.append(piece.arguments)
            # A custom tool's text is inside of a JSON string: it is sent when that is whole.
            if item.kind == "function_call" and item is self._open:
                fields = {"item_id": item.id, "output_index": item.index}
                events.append(
                    (
                        "response.function_call_arguments.delta",
                        {**fields, "delta": piece.arguments},
                    )
                )

    def _end(self, reason: str, events: list[Event]) -> None:
        if not self._items:
            self._current("message", events)
        cut = reason == "length"
        self._close_all("incomplete" if cut else "completed", events)
        self.status = "incomplete" if cut else "completed"
        if not cut:
            self._completed_s = int(time.time())

    def _close_all(self, status: str, events: list[Event]) -> None:
        """Close the open item, if any."""
        item, self._open = self._open, None
        if item is None:
            return
        item.status = status
        if item.kind == "message":
            self._taken_logprobs(item)
        document = self._document(item)
        place = {"item_id": item.id, "output_index": item.index}
        if item.kind in ("message", "reasoning"):
            (part,) = document["content"]
            fields = {**_place(item), "text": part["text"]}
            if item.kind == "message":
                done = ("response.output_text.done", {**fields, "logprobs": _short(item.logprobs)})
            else:
                done = ("response.reasoning_text.done", fields)
            events.append(done)
            events.append(("response.content_part.done", {**_place(item), "part": part}))
        elif item.kind == "function_call":
            fields = {**place, "arguments": document["arguments"]}
            events.append(("response.function_call_arguments.done", fields))
        else:
            text = document["input"]
            if text:
                delta = {**place, "delta": text}
                events.append(("response.custom_tool_call_input.delta", delta))
            events.append(("response.custom_tool_call_input.done", {**place, "input": text}))
        done_fields = {"output_index": item.index, "item": document}
        events.append(("response.output_item.done", done_fields))

    def _taken_logprobs(self, item: _Item) -> list[ReportedLogprob]:
        taken, self._logprobs = self._logprobs, []
        item.logprobs += taken
        return taken

    def _delta(self, kind: str, item: _Item, text: str) -> Event:
        return kind, {**_place(item), "delta": text}

    def _document(self, item: _Item) -> dict[str, Any]:
        document: dict[str, Any] = {"id": item.id, "type": item.kind}
        if item.kind == "message":
            part = {
                "type": "output_text",
                "text": item.text,
                "annotations": [],
                "logprobs": [_long(entry) for entry in item.logprobs],
            }
            return {**document, "status": item.status, "role": "assistant", "content": [part]}
        if item.kind == "reasoning":
            part = {"type": "reasoning_text", "text": item.text}
            return {**document, "status": item.status, "summary": [], "content": [part]}
        assert item.call is not None
        document["call_id"] = item.call.id or item.id
        document["name"] = item.tool.name if item.tool else item.call.name or ""
        if item.tool is not None and item.tool.namespace is not None:
            document["namespace"] = item.tool.namespace
        if item.kind == "function_call":
            return {**document, "status": item.status, "arguments": item.text}
        is_over = item.status != "in_progress"
        return {**document, "input": custom_input(item.text) if is_over else ""}


def _place(item: _Item) -> dict[str, Any]:
    return {"item_id": item.id, "output_index": item.index, "content_index": 0}


def _frame(body: ResponseBody, response_id: str, created_s: float) -> dict[str, Any]:
    """The fields of a response that its request decides."""
    text = body.text
    form = text.format.as_document() if text and text.format else {"type": "text"}
    reasoning = body.reasoning
    choice = body.tool_choice
    shown: Mapping[str, Any] | str = "auto"
    if isinstance(choice, str):
        shown = choice
    elif choice is not None:
        shown = choice.as_document()
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(created_s),
        "background": body.runs_in_background,
        "instructions": body.instructions,
        "max_output_tokens": None if body.max_output_tokens == -1 else body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": body.model or "",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": _plain(body.prompt_cache_key),
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "safety_identifier": _plain(body.safety_identifier),
        "service_tier": "default",
        "temperature": body.temperature,
        "text": {"format": form},
        "tool_choice": shown,
        "tools": [tool.as_document() for tool in body.tools or () if not tool.is_hosted],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "user": _plain(body.user),
    }


def _plain(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def usage_document(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _short(entries: Sequence[ReportedLogprob]) -> list[dict[str, Any]]:
    """As events have them."""
    return [
        {
            "token": entry.name,
            "logprob": entry.logprob,
            "top_logprobs": [
                {"token": other.name, "logprob": other.logprob} for other in entry.top
            ],
        }
        for entry in entries
    ]


def _long(entry: ReportedLogprob) -> dict[str, Any]:
    """As items have them."""
    return {**_token(entry), "top_logprobs": [_token(other) for other in entry.top]}


def _token(entry: ReportedLogprob) -> dict[str, Any]:
    return {
        "token": entry.name,
        "bytes": list(entry.text.encode("utf-8", errors="replace")),
        "logprob": entry.logprob,
    }
