"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over JSON and SSE.

The data comes from api/anthropic_answers.py; here are its names and places in Anthropic's
documents. What errors look like under these paths is in errors.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from packhorse.serve.api.anthropic import CountTokensBody, MessagesBody, count_tokens
from packhorse.serve.api.anthropic_answers import (
    AnswerBlock,
    MessageAnswer,
    MessageResponder,
    Step,
    Text,
    Thought,
)
from packhorse.serve.api.generate import (
    CallContext,
    RefusalsCounted,
    answer_metadata,
    collect,
    head_of,
    requests_of,
)
from packhorse.serve.api.models import ModelCard
from packhorse.serve.errors import Invalid, ServeError
from packhorse.serve.messages import Chunk, GenerateRequest, Usage
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.pipeline import Pipeline, Stream
from packhorse.serve.rest.errors import anthropic_error_body
from packhorse.serve.rest.generate import PlainRoute, cache_policy, timeout_of
from packhorse.serve.rest.openapi import body_document, documented
from packhorse.serve.rest.requests import BodyLimits, ClientWatch, read_body
from packhorse.serve.rest.responses import json_response
from packhorse.serve.rest.sse import EventStream
from packhorse.serve.settings.http import HttpSettings

IGNORED = "x-packhorse-ignored"
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
# Of /v1/models, unless `limit` says otherwise; as in Anthropic's API.
MODELS_A_PAGE = 20
LIMIT = re.compile(r"1000|[1-9][0-9]{0,2}")
STOP = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
# Kind of a step -> the type of its delta, and the field that holds the text.
DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "signature": ("signature_delta", "signature"),
    "input": ("input_json_delta", "partial_json"),
}

_quote: Callable[[str], str] = json.encoder.encode_basestring_ascii  # as in sse.py


def routes(pipeline: Pipeline, settings: HttpSettings, metrics: ServerMetrics) -> APIRouter:
    """The endpoints over one pipeline."""
    router = APIRouter(route_class=PlainRoute)
    limits = BodyLimits(settings, pipeline.admission.bodies)

    @router.post(
        "/v1/messages",
        responses=documented("Message", streams=True, error="AnthropicError"),
        openapi_extra=body_document(MessagesBody),
    )
    async def create_message(request: Request) -> Response:
        state = request.state
        request_id: str = state.request_id
        with RefusalsCounted(pipeline, request_id, state.caller):
            body = await read_body(request, MessagesBody, limits, settings.unknown_fields)
            context = CallContext(
                request_id,
                state.caller,
                timeout_of(request, body.timeout_s),
                cache_policy(request, body.cache),
                getattr(state, "trace", None),
            )
            requests = requests_of(pipeline, body, context)
        if body.stream:
            return EventStream(
                partial(pipeline.start_all, requests),
                MessageEvents(request_id),
                stalled_client_timeout_s=settings.stalled_client_timeout_s,
                heartbeat_s=settings.heartbeat_s,
                headers=partial(headers, body),
                metrics=metrics,
                heartbeat=PING,
            )
        async with ClientWatch(request.scope, request.receive):
            return await whole(requests, body, request_id)

    @router.post(
        "/v1/messages/count_tokens",
        responses=documented("MessageTokens", error="AnthropicError"),
        openapi_extra=body_document(CountTokensBody),
    )
    async def count(request: Request) -> Response:
        """The tokens of a message's prompt; nothing is generated."""
        state = request.state
        with RefusalsCounted(pipeline, state.request_id, state.caller):
            body = await read_body(request, CountTokensBody, limits, settings.unknown_fields)
            context = CallContext(state.request_id, state.caller)
            tokens = await count_tokens(pipeline, body, context)
        told = {IGNORED: ", ".join(body.ignored)} if body.ignored else None
        return json_response({"input_tokens": tokens}, told)

    async def whole(
        requests: Sequence[GenerateRequest], body: MessagesBody, request_id: str
    ) -> Response:
        streams = await pipeline.start_all(requests)
        (choice,) = await collect(streams)
        answer = MessageResponder().whole(request_id, streams, choice)
        return json_response(_message(answer), headers(body, streams))

    def headers(body: MessagesBody, streams: Sequence[Stream]) -> dict[str, str]:
        metadata = answer_metadata(pipeline, streams)
        if names := metadata.get(IGNORED):
            metadata[IGNORED] = ", ".join(dict.fromkeys(body.own_names(names.split(", "))))
        return metadata

    return router


class MessageEvents:
    """The events of one streamed message."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._responder = MessageResponder()
        self._streams: Sequence[Stream] = ()
        self._around = ("", "")
        self._around_index: int | None = None

    def begin(self, streams: Sequence[Stream]) -> bytes:
        self._streams = streams
        (stream,) = streams
        head = head_of(self._responder.id_prefix, self._request_id, streams)
        message: dict[str, Any] = {
            "id": head.id,
            "type": "message",
            "role": "assistant",
            "model": head.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(stream.context.usage),
        }
        start = _event("message_start", message=message)
        return start + b"".join(map(_step, self._responder.begin(stream)))

    def plain(self) -> tuple[str, str] | None:
        """None for an answer that is parsed: which block a text goes to is not known before."""
        index = self._responder.open_text
        return None if index is None else _around_text(index)

    def event(self, number: int, chunk: Chunk) -> bytes:
        index = self._responder.open_text
        if index is not None and chunk.finish_reason is None and chunk.is_plain:
            if index != self._around_index:
                self._around, self._around_index = _around_text(index), index
            head, tail = self._around
            return f"{head}{_quote(chunk.text)}{tail}".encode()
        return b"".join(map(_step, self._responder.steps(chunk)))

    def end(self) -> bytes:
        stop = self._responder.stop
        delta = {"stop_reason": stop.reason, "stop_sequence": stop.sequence}
        usage = _usage(self._streams[0].context.usage)
        return _event("message_delta", delta=delta, usage=usage) + STOP

    def fail(self, error: ServeError) -> bytes:
        body = anthropic_error_body(error, self._request_id)
        return b"event: error\ndata: " + body + b"\n\n"


def models_page(cards: Sequence[ModelCard], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of the models' list, for clients that send the header anthropic-version. Raises
    Invalid for a limit that is none.
    """
    limit = query.get("limit", str(MODELS_A_PAGE))
    if not LIMIT.fullmatch(limit):
        raise Invalid("limit is not a number from 1 to 1000; send one.", param="limit")
    after, before = query.get("after_id"), query.get("before_id")
    names = [card.id for card in cards]
    start = names.index(after) + 1 if after in names else 0
    end = names.index(before) if before in names else len(cards)
    size = int(limit)
    has_more = end - start > size
    # Before a model: the page that ends there.
    found = cards[start:end][-size:] if before in names else cards[start:end][:size]
    return {
        "data": list(map(model_info, found)),
        "has_more": has_more,
        "first_id": found[0].id if found else None,
        "last_id": found[-1].id if found else None,
    }


def model_info(card: ModelCard) -> dict[str, Any]:
    created = datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": "model",
        "id": card.id,
        "display_name": card.id,
        "created_at": created,
        "lifecycle": "active",
        "max_input_tokens": card.max_model_len,
        "max_tokens": card.max_model_len,
    }


def _message(answer: MessageAnswer) -> dict[str, Any]:
    return {
        "id": answer.head.id,
        "type": "message",
        "role": "assistant",
        "model": answer.head.model,
        "content": list(map(_block, answer.blocks)),
        "stop_reason": answer.stop.reason,
        "stop_sequence": answer.stop.sequence,
        "usage": _usage(answer.usage),
    }


def _block(block: AnswerBlock) -> dict[str, Any]:
    if isinstance(block, Text):
        return {"type": "text", "text": block.text}
    if isinstance(block, Thought):
        return {"type": "thinking", "thinking": block.thinking, "signature": block.signature}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": block.input}


def _usage(usage: Usage) -> dict[str, Any]:
    """input_tokens are those that the prefix cache did not hold, as in Anthropic's API."""
    document: dict[str, Any] = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
    if usage.reasoning_tokens:
        document["output_tokens_details"] = {"thinking_tokens": usage.reasoning_tokens}
    return document


def _event(name: str, **fields: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n".encode()


def _step(step: Step) -> bytes:
    if step.block is not None:
        return _event("content_block_start", index=step.index, content_block=_block(step.block))
    if step.kind == "stop":
        return _event("content_block_stop", index=step.index)
    kind, name = DELTAS[step.kind]
    return _event("content_block_delta", index=step.index, delta={"type": kind, name: step.value})


def _around_text(index: int) -> tuple[str, str]:
    """JSON around the text of an event that adds to the block."""
    head = f'{{"type": "content_block_delta", "index": {index}, "delta": {{"type": "text_delta", '
    return f'event: content_block_delta\ndata: {head}"text": ', "}}\n\n"
