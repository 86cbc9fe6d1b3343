"""The data of an answer in Anthropic's Messages API: whole, and as the steps of a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec
import pydantic_core

from packhorse.serve.api.generate import AnswerHead, CollectedChoice, head_of, total_usage
from packhorse.serve.messages import Chunk, FinishReason, ToolCall, Usage
from packhorse.serve.pipeline import Stream

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Text(NamedTuple):
    """A block of the answer's text."""

    text: str


class Thought(NamedTuple):
    """A block of reasoning."""

    thinking: str
    signature: str


class ToolUse(NamedTuple):
    """A block that calls a tool."""

    id: str
    name: str
    input: dict[str, Any]


AnswerBlock = Text | Thought | ToolUse


class Stop(NamedTuple):
    """Why an answer ended."""

    reason: StopReason
    sequence: str | None


@dataclass(frozen=True, slots=True)
class MessageAnswer:
    """A whole answer."""

    head: AnswerHead
    blocks: list[AnswerBlock]
    stop: Stop
    usage: Usage


class Step(msgspec.Struct, frozen=True):
    """A step of a streamed answer, which concerns one of its blocks: it starts, grows or stops."""

    kind: Literal["start", "text", "thinking", "signature", "input", "stop"]
    index: int
    value: str = ""
    """What the block grows by: `input` is a piece of JSON."""
    block: AnswerBlock | None = None
    """Of a start: the block, empty."""


def stop_of(finish_reason: FinishReason | None, stop: str | int | None, *, calls: bool) -> Stop:
    """Why an answer ended, in Anthropic's words. `calls`: it calls tools."""
    if finish_reason == "length":
        return Stop("max_tokens", None)
    if calls:
        return Stop("tool_use", None)
    if isinstance(stop, str):
        return Stop("stop_sequence", stop)
    return Stop("end_turn", None)


class MessageResponder:
    """Turns what the engine generates for one message into the data of its answer.

    A block's signature is a digest of its thinking: clients send it back, and it says nothing.
    """

    id_prefix = "msg_"

    def __init__(self) -> None:
        self._next_index = 0
        self._open: Literal["text", "thinking", "input"] | None = None
        self._calls: dict[int, int] = {}  # call -> its block
        self._digest = _digest()
        self.stop = Stop("end_turn", None)
        """Of a streamed answer, after its last chunk."""

    @property
    def open_text(self) -> int | None:
        """The index of the block that more text goes to; None: it takes another step first."""
        return self._newest if self._open == "text" else None

    def whole(
        self, request_id: str, streams: Sequence[Stream], choice: CollectedChoice
    ) -> MessageAnswer:
        """The answer to a call whose stream has ended."""
        blocks: list[AnswerBlock] = []
        if thinking := "".join(choice.reasoning):
            digest = _digest()
            digest.update(_bytes(thinking))
            blocks.append(Thought(thinking, digest.hexdigest()))
        if choice.text or not streams[0].context.prompt.is_parsed:
            blocks.append(Text(choice.text))
        blocks += [_tool_use(call) for call in choice.tool_calls]
        stop = stop_of(choice.finish_reason, choice.stop_reason, calls=bool(choice.tool_calls))
        head = head_of(self.id_prefix, request_id, streams)
        return MessageAnswer(head, blocks, stop, total_usage(streams))

    def begin(self, stream: Stream) -> list[Step]:
        """The steps before the first chunk: an answer that is not parsed is one block of text."""
        return [] if stream.context.prompt.is_parsed else list(self._start("text", Text("")))

    def steps(self, chunk: Chunk) -> list[Step]:
        """The steps that stream this chunk."""
        found: list[Step] = []
        calls = list(chunk.tool_calls)
        # The rest of a call that is open: text of the same chunk would close it.
        while calls and self._open == "input" and self._calls.get(calls[0].index) == self._newest:
            found += self._input(calls.pop(0))
        if chunk.reasoning:
            if self._open != "thinking":
                found += self._start("thinking", Thought("", ""))
            self._digest.update(_bytes(chunk.reasoning))
            found.append(Step("thinking", self._newest, chunk.reasoning))
        if chunk.text:
            if self._open != "text":
                found += self._start("text", Text(""))
            found.append(Step("text", self._newest, chunk.text))
        for call in calls:
            if call.index not in self._calls:
                found += self._start("input", ToolUse(call.id or "", call.name or "", {}))
                self._calls[call.index] = self._newest
            found += self._input(call)
        if chunk.finish_reason is not None:
            self.stop = stop_of(chunk.finish_reason, chunk.stop_reason, calls=bool(self._calls))
            found += self._close()
        return found

    @property
    def _newest(self) -> int:
        """The index of the block that was started last."""
        return self._next_index - 1

    def _input(self, call: ToolCall) -> list[Step]:
        """More of a call whose block there is."""
        return [Step("input", self._calls[call.index], call.arguments)] if call.arguments else []

    def _start(
        self, kind: Literal["text", "thinking", "input"], block: AnswerBlock
    ) -> Iterator[Step]:
        yield from self._close()
        self._open = kind
        self._digest = _digest()
        self._next_index += 1
        yield Step("start", self._newest, block=block)

    def _close(self) -> Iterator[Step]:
        """End the open block. A call that has no arguments so far has the empty object."""
        if self._open is None:
            return
        index = self._newest
        if self._open == "thinking":
            yield Step("signature", index, self._digest.hexdigest())
        self._open = None
        yield Step("stop", index)


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16, person=b"thinking")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")


def _tool_use(call: ToolCall) -> ToolUse:
    """A call's arguments as an object, which they are not yet where the answer was cut."""
    try:
        found = pydantic_core.from_json(
            call.arguments or "{}", allow_partial=True, allow_inf_nan=False
        )
    except ValueError:
        found = call.arguments
    if not isinstance(found, dict):
        found = {"value": found}  # Anthropic's types have no other place for it
    return ToolUse(call.id or "", call.name or "", found)
