"""How the two endpoints word their answers: chunks to the JSON that OpenAI's clients read.

A Shape is made per call. Its `event` builds any streamed event; plain text, which is nearly all,
goes through `head` and `tail` instead, see sse.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

from packhorse.serve.api.answers import Answer, sum_of
from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.messages import Chunk, Prompt, TokenLogprob, ToolCall, Usage
from packhorse.serve.stream import Stream


class Shape(Protocol):
    """What an endpoint's answers look like, streamed and whole."""

    whole_object: str
    event_object: str
    id_prefix: str
    head: str
    close: str
    """Around a plain event's text, inside its choice."""
    all_plain: bool
    """Whether plain chunks may go through head and close."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of an event before a choice's first text, or None."""
        ...

    def opening_extras(self, prompt: Prompt) -> dict[str, Any]:
        """Fields of the first opening beside its choices."""
        ...

    def event(self, index: int, chunk: Chunk, prompt: Prompt) -> dict[str, Any]:
        """The choice of one streamed event."""
        ...

    def whole(self, index: int, answer: Answer, prompt: Prompt) -> dict[str, Any]:
        """The choice of a whole answer."""
        ...

    def extras(self, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        """Fields of a whole answer beside its choices."""
        ...


class ChatShape:
    """POST /v1/chat/completions."""

    whole_object = "chat.completion"
    event_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"
    head = '"delta": {"content": '
    close = "}"

    def __init__(self, body: ChatBody) -> None:
        self._body = body
        # No top_logprobs is none; the engine reports the best one all the same.
        self._num_top = body.top_logprobs or 0
        self.all_plain = not (body.logprobs or body.return_token_ids)

    def opening(self, index: int) -> dict[str, Any] | None:
        # Clients expect the role before the first text.
        return {"index": index, "delta": {"role": "assistant", "content": ""}, **_END_NONE}

    def opening_extras(self, prompt: Prompt) -> dict[str, Any]:
        return {"prompt_token_ids": list(prompt.token_ids)} if self._body.return_token_ids else {}

    def event(self, index: int, chunk: Chunk, prompt: Prompt) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if chunk.reasoning is not None:
            delta["reasoning"] = chunk.reasoning
        if chunk.tool_calls:
            delta["tool_calls"] = [_call_piece(call) for call in chunk.tool_calls]
        if chunk.text or not delta:
            delta["content"] = chunk.text
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(chunk.logprobs),
            "finish_reason": chunk.finish_reason,
        }
        if chunk.finish_reason is not None:
            choice["stop_reason"] = chunk.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = list(chunk.token_ids)
        return choice

    def whole(self, index: int, answer: Answer, prompt: Prompt) -> dict[str, Any]:
        text = "".join(answer.parts)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if answer.tool_calls and not text else text,
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning"] = "".join(answer.reasoning)
        if answer.tool_calls:
            message["tool_calls"] = [_call(call) for call in answer.tool_calls]
        choice = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def extras(self, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        extras = self.opening_extras(prompt)
        if self._body.prompt_logprobs is not None:
            extras["prompt_logprobs"] = prompt_logprobs_json(answer.prompt_logprobs)
        return extras

    def _logprobs(self, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return {
            "content": [
                {
                    **_token_json(entry, as_ids),
                    "top_logprobs": [
                        _token_json(other, as_ids) for other in _best(entry, self._num_top)
                    ],
                }
                for entry in logprobs
            ]
        }


class TextShape:
    """POST /v1/completions."""

    whole_object = "text_completion"
    event_object = "text_completion"
    id_prefix = "cmpl-"
    head = '"text": '
    close = ""

    def __init__(self, body: CompletionBody) -> None:
        self._body = body
        self._offsets: dict[int, int] = {}  # choice -> characters sent, for text_offset
        self._begun: set[int] = set()
        self.all_plain = body.logprobs is None and not (body.return_token_ids or body.echo)

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def opening_extras(self, prompt: Prompt) -> dict[str, Any]:
        return {}

    def event(self, index: int, chunk: Chunk, prompt: Prompt) -> dict[str, Any]:
        answer = Answer()
        answer.add(chunk)
        first = index not in self._begun
        self._begun.add(index)
        choice = self._choice(index, answer, prompt, with_prompt=first)
        if chunk.finish_reason is None:
            del choice["stop_reason"]
        return choice

    def whole(self, index: int, answer: Answer, prompt: Prompt) -> dict[str, Any]:
        choice = self._choice(index, answer, prompt, with_prompt=True)
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(answer.prompt_logprobs)
        return choice

    def extras(self, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        return {}

    def _choice(
        self, index: int, answer: Answer, prompt: Prompt, *, with_prompt: bool
    ) -> dict[str, Any]:
        body = self._body
        echoes = with_prompt and body.echo
        text = "" if body.echo_only else "".join(answer.parts)
        logprobs = [] if body.echo_only else list(answer.logprobs or ())
        if echoes:
            text = (prompt.text or "") + text
            logprobs = [*(answer.prompt_logprobs or ()), *logprobs]
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None if body.logprobs is None else self._logprobs(index, logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = list(answer.token_ids)
            if with_prompt:
                choice["prompt_token_ids"] = list(prompt.token_ids)
        return choice

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        as_ids = bool(self._body.return_tokens_as_token_ids)
        num_top = self._body.logprobs or 0
        offset = self._offsets.get(index, 0)
        offsets = []
        for entry in logprobs:
            offsets.append(offset)
            offset += len(_name(entry, as_ids))
        self._offsets[index] = offset
        return {
            "tokens": [_name(entry, as_ids) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [
                None
                if entry.logprob is None
                # OpenAI's form: the token itself, then the best, as a mapping.
                else {
                    _name(entry, as_ids): entry.logprob,
                    **{_name(other, as_ids): other.logprob for other in _best(entry, num_top)},
                }
                for entry in logprobs
            ],
            "text_offset": offsets,
        }


_END_NONE: dict[str, Any] = {"logprobs": None, "finish_reason": None}


def _best(entry: TokenLogprob, count: int) -> Sequence[TokenLogprob]:
    return entry.top if count < 0 else entry.top[:count]


def _name(entry: TokenLogprob, as_id: bool) -> str:
    return f"token_id:{entry.token_id}" if as_id else entry.token


def _token_json(entry: TokenLogprob, as_id: bool) -> dict[str, Any]:
    return {
        "token": _name(entry, as_id),
        "logprob": entry.logprob,
        "bytes": list(entry.token.encode("utf-8", errors="replace")),
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _call_piece(call: ToolCall) -> dict[str, Any]:
    """A streamed piece names the call's id, type and function once."""
    function = {"arguments": call.arguments}
    if call.name is not None:
        function = {"name": call.name, **function}
    piece: dict[str, Any] = {"index": call.index, "function": function}
    return piece if call.id is None else {**piece, "id": call.id, "type": "function"}


def prompt_logprobs_json(entries: Sequence[TokenLogprob] | None) -> list[Any] | None:
    """vLLM's form: for each token of the prompt its alternatives by id; none for the first."""
    if entries is None:
        return None
    return [
        None
        if entry.logprob is None
        else {
            str(other.token_id): {
                "logprob": other.logprob,
                "rank": other.rank,
                "decoded_token": other.token,
            }
            for other in entry.top
        }
        for entry in entries
    ]


def usage_json(usages: Sequence[Usage]) -> dict[str, Any]:
    """The sum over a call's prompts."""
    total = sum_of(usages)
    document: dict[str, Any] = {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "total_tokens": total.prompt_tokens + total.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": total.cached_tokens},
    }
    if total.reasoning_tokens:
        document["completion_tokens_details"] = {"reasoning_tokens": total.reasoning_tokens}
    return document


def common_fields(shape: Shape, request_id: str, model: str) -> dict[str, Any]:
    """What every event and every whole answer of a call begins with."""
    return {"id": shape.id_prefix + request_id, "created": int(time.time()), "model": model}


def whole_document(
    shape: Shape, common: dict[str, Any], answers: dict[int, Answer], streams: Sequence[Stream]
) -> bytes:
    """A whole answer's JSON; `answers` by index, of all choices of all streams."""
    per_prompt = len(answers) // len(streams)
    choices = [
        shape.whole(index, answers[index], streams[index // per_prompt].prompt)
        for index in sorted(answers)
    ]
    document = {
        **common,
        "object": shape.whole_object,
        "choices": choices,
        "usage": usage_json([stream.usage for stream in streams]),
        **shape.extras(streams[0].prompt, answers[0]),
    }
    return json.dumps(document).encode()
