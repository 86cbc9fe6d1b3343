"""JSON of chat's and plain completions' answers: whole, and as events of a stream.

The data comes from api/; here are its names and places in OpenAI's documents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import Response

from packhorse.serve.api.chat import ChatBody, ChatChoice, ChatResponder
from packhorse.serve.api.completions import CompletionBody, CompletionChoice, CompletionResponder
from packhorse.serve.api.generate import AnswerHead, CollectedChoice, head_of, total_usage
from packhorse.serve.api.logprobs import OffsetLogprobs, PromptLogprobs, ReportedLogprob
from packhorse.serve.errors import ServeError
from packhorse.serve.messages import Chunk, Prompt, ToolCall, Usage
from packhorse.serve.pipeline import Stream
from packhorse.serve.rest.errors import error_body

DONE = b"data: [DONE]\n\n"


def json_response(document: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(document), headers=headers, media_type="application/json")


class Encoder(Protocol):
    """Encodes the answers of one call as JSON."""

    id_prefix: str
    event_object: str
    head: str
    close: str
    """JSON around the text of a plain event, inside its choice."""
    all_plain: bool
    """Whether plain chunks may be encoded with head and close."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the event before a choice's first text; None: there is none."""
        ...

    def opening_fields(self, prompt: Prompt) -> dict[str, Any]:
        """Fields of the first opening beside its choices."""
        ...

    def event(self, index: int, chunk: Chunk, prompt: Prompt) -> dict[str, Any]:
        """The choice of the event that streams this chunk."""
        ...

    def whole(
        self, request_id: str, streams: Sequence[Stream], choices: Sequence[CollectedChoice]
    ) -> dict[str, Any]:
        """The document of a whole answer."""
        ...


class ChatEncoder:
    """POST /v1/chat/completions."""

    id_prefix = ChatResponder.id_prefix
    event_object = "chat.completion.chunk"
    head = '"delta": {"content": '
    close = "}"

    def __init__(self, body: ChatBody) -> None:
        self._responder = ChatResponder(body)
        self.all_plain = self._responder.all_plain

    def opening(self, index: int) -> dict[str, Any] | None:
        # Clients expect the role before the first text.
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def opening_fields(self, prompt: Prompt) -> dict[str, Any]:
        token_ids = self._responder.prompt_token_ids(prompt)
        return {} if token_ids is None else {"prompt_token_ids": list(token_ids)}

    def event(self, index: int, chunk: Chunk, prompt: Prompt) -> dict[str, Any]:
        piece = self._responder.piece(index, chunk, prompt)
        delta: dict[str, Any] = {}
        if piece.reasoning is not None:
            delta["reasoning"] = piece.reasoning
        if piece.tool_calls:
            delta["tool_calls"] = [_call_piece(call) for call in piece.tool_calls]
        if piece.content is not None:
            delta["content"] = piece.content
        document = self._choice(piece, {"delta": delta})
        if piece.finish_reason is None:
            del document["stop_reason"]
        return document

    def whole(
        self, request_id: str, streams: Sequence[Stream], choices: Sequence[CollectedChoice]
    ) -> dict[str, Any]:
        answer = self._responder.whole(request_id, streams, choices)
        document = _head(answer.head, "chat.completion")
        document["choices"] = [
            self._choice(choice, {"message": _message(choice)}) for choice in answer.choices
        ]
        document["usage"] = usage_json(answer.usage)
        if answer.prompt_token_ids is not None:
            document["prompt_token_ids"] = list(answer.prompt_token_ids)
        if answer.prompt_logprobs is not None:
            document["prompt_logprobs"] = _prompt_logprobs(answer.prompt_logprobs)
        return document

    def _choice(self, choice: ChatChoice, content: dict[str, Any]) -> dict[str, Any]:
        document = {
            "index": choice.index,
            **content,
            "logprobs": _chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if choice.token_ids is not None:
            document["token_ids"] = list(choice.token_ids)
        return document


class CompletionEncoder:
    """POST /v1/completions."""

    id_prefix = CompletionResponder.id_prefix
    event_object = "text_completion"
    head = '"text": '
    close = ""

    def __init__(self, body: CompletionBody) -> None:
        self._responder = CompletionResponder(body)
        self.all_plain = self._responder.all_plain

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def opening_fields(self, prompt: Prompt) -> dict[str, Any]:
        return {}

    def event(self, index: int, chunk: Chunk, prompt: Prompt) -> dict[str, Any]:
        piece = self._responder.piece(index, chunk, prompt)
        document = self._choice(piece)
        if piece.finish_reason is None:
            del document["stop_reason"]
        return document

    def whole(
        self, request_id: str, streams: Sequence[Stream], choices: Sequence[CollectedChoice]
    ) -> dict[str, Any]:
        answer = self._responder.whole(request_id, streams, choices)
        document = _head(answer.head, "text_completion")
        document["choices"] = list(map(self._choice, answer.choices))
        document["usage"] = usage_json(answer.usage)
        return document

    def _choice(self, choice: CompletionChoice) -> dict[str, Any]:
        document: dict[str, Any] = {
            "index": choice.index,
            "text": choice.text,
            "logprobs": None if choice.logprobs is None else _text_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if choice.token_ids is not None:
            document["token_ids"] = list(choice.token_ids)
        if choice.prompt_token_ids is not None:
            document["prompt_token_ids"] = list(choice.prompt_token_ids)
        if choice.prompt_logprobs is not None:
            document["prompt_logprobs"] = _prompt_logprobs(choice.prompt_logprobs)
        return document


def _head(head: AnswerHead, kind: str) -> dict[str, Any]:
    return {"id": head.id, "created": head.created, "model": head.model, "object": kind}


def usage_json(usage: Usage) -> dict[str, Any]:
    document: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens:
        document["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return document


def _message(choice: ChatChoice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.reasoning is not None:
        message["reasoning"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [_call(call) for call in choice.tool_calls]
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _call_piece(call: ToolCall) -> dict[str, Any]:
    """A streamed piece; only a call's first piece has its id, type and name."""
    function = {"arguments": call.arguments}
    if call.name is not None:
        function = {"name": call.name, **function}
    piece: dict[str, Any] = {"index": call.index, "function": function}
    return piece if call.id is None else {**piece, "id": call.id, "type": "function"}


def _chat_logprobs(entries: Sequence[ReportedLogprob] | None) -> dict[str, Any] | None:
    if entries is None:
        return None
    return {
        "content": [
            {**_token(entry), "top_logprobs": [_token(other) for other in entry.top]}
            for entry in entries
        ]
    }


def _token(entry: ReportedLogprob) -> dict[str, Any]:
    return {
        "token": entry.name,
        "logprob": entry.logprob,
        "bytes": list(entry.text.encode("utf-8", errors="replace")),
    }


def _text_logprobs(logprobs: OffsetLogprobs) -> dict[str, Any]:
    entries = logprobs.entries
    return {
        "tokens": [entry.name for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            None
            if entry.logprob is None
            # OpenAI's form: the token itself, then the best ones, as a mapping.
            else {
                entry.name: entry.logprob,
                **{other.name: other.logprob for other in entry.top},
            }
            for entry in entries
        ],
        "text_offset": list(logprobs.text_offsets),
    }


def _prompt_logprobs(logprobs: PromptLogprobs) -> list[Any] | None:
    """vLLM's form: the alternatives of each of the prompt's tokens by id; None for the first."""
    if logprobs.entries is None:
        return None
    return [
        None
        if entry.logprob is None
        else {
            str(other.token_id): {
                "logprob": other.logprob,
                "rank": other.rank,
                "decoded_token": other.text,
            }
            for other in entry.top
        }
        for entry in logprobs.entries
    ]


class ChoiceEvents:
    """The events of one streamed call, in OpenAI's form for chat and plain completions: openings,
    one event a chunk, the usage when requested, and [DONE].

    With `include_usage` every event but the last has `"usage": null`; with `continuous_usage` each
    has the count of its own prompt so far. What all events have in common is encoded once.
    """

    def __init__(
        self, encoder: Encoder, request_id: str, *, include_usage: bool, continuous_usage: bool
    ) -> None:
        self._encoder = encoder
        self._request_id = request_id
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._streams: Sequence[Stream] = ()
        self._prefix = ""
        self._per_prompt = 1

    def begin(self, streams: Sequence[Stream]) -> bytes:
        self._streams = streams
        encoder = self._encoder
        head = head_of(encoder.id_prefix, self._request_id, streams)
        self._prefix = json.dumps(_head(head, encoder.event_object))[:-1]
        self._per_prompt = streams[0].context.request.sampling.n
        return b"".join(map(self._opening, range(len(streams) * self._per_prompt)))

    def plain(self) -> tuple[str, str] | None:
        encoder = self._encoder
        if not encoder.all_plain or self._continuous_usage:
            return None
        end = ', "usage": null' if self._include_usage else ""
        return (
            f'data: {self._prefix}, "choices": [{{"index": 0, {encoder.head}',
            f'{encoder.close}, "logprobs": null, "finish_reason": null}}]{end}}}\n\n',
        )

    def event(self, number: int, chunk: Chunk) -> bytes:
        stream = self._streams[number]
        index = number * self._per_prompt + chunk.index
        choice = self._encoder.event(index, chunk, stream.context.prompt)
        return self._wrap(f"[{json.dumps(choice)}]", self._usage_so_far(stream))

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return self._wrap("[]", json.dumps(usage_json(total_usage(self._streams)))) + DONE

    def fail(self, error: ServeError) -> bytes:
        return b"data: " + error_body(error) + b"\n\n" + DONE

    def _opening(self, index: int) -> bytes:
        choice = self._encoder.opening(index)
        if choice is None:
            return b""
        stream = self._streams[index // self._per_prompt]
        fields = {} if index else self._encoder.opening_fields(stream.context.prompt)
        return self._wrap(f"[{json.dumps(choice)}]", self._usage_so_far(stream), fields)

    def _usage_so_far(self, stream: Stream) -> str | None:
        if self._continuous_usage:
            return json.dumps(usage_json(stream.context.usage))
        return "null" if self._include_usage else None

    def _wrap(self, choices: str, usage: str | None, fields: dict[str, Any] | None = None) -> bytes:
        end = "" if usage is None else f', "usage": {usage}'
        if fields:
            end += ", " + json.dumps(fields)[1:-1]
        return f'data: {self._prefix}, "choices": {choices}{end}}}\n\n'.encode()
