"""POST /v1/chat/completions and /v1/completions: the same flow, two shapes of answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.errors import ServeError
from serve.messages import Usage
from serve.rest.body import read_body, unless_disconnected
from serve.rest.schema import ChatBody, CompletionBody
from serve.rest.sse import EventStream
from serve.service import Service, Stream


@dataclass(frozen=True)
class Shape:
    """How one endpoint words its answers. `head` and `close` surround an event's text inside its
    choice.
    """

    id_prefix: str
    whole: str
    event: str
    head: str
    close: str
    whole_choice: Callable[[str], dict[str, Any]]


CHAT = Shape(
    "chatcmpl-", "chat.completion", "chat.completion.chunk", '"delta": {"content": ', "}",
    lambda text: {"message": {"role": "assistant", "content": text}},
)  # fmt: skip
TEXT = Shape(
    "cmpl-", "text_completion", "text_completion", '"text": ', "", lambda text: {"text": text}
)


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def routes(service: Service, *, max_body_bytes: int) -> APIRouter:
    """Both endpoints over one service."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, ChatBody, CHAT)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionBody, TEXT)

    async def answer(
        request: Request, schema: type[ChatBody] | type[CompletionBody], shape: Shape
    ) -> Response:
        request_id: str = request.state.request_id
        try:
            body = await read_body(request, schema, max_bytes=max_body_bytes)
            asked = body.to_request(request_id)
        except ServeError as error:
            service.refused(request_id, error)
            raise
        created_s = int(time.time())
        stream = await unless_disconnected(request.receive, service.start(asked))
        common = {
            "id": shape.id_prefix + request_id,
            "created": created_s,
            "model": stream.route.model,
        }
        if body.stream:
            return event_stream(stream, shape, common, include_usage=body.include_usage)
        text, finish_reason = await unless_disconnected(request.receive, collect(stream))
        choice = {
            "index": 0,
            **shape.whole_choice(text),
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        document = {
            **common,
            "object": shape.whole,
            "choices": [choice],
            "usage": usage_json(stream.usage),
        }
        return Response(json.dumps(document), media_type="application/json")

    return router


async def collect(stream: Stream) -> tuple[str, str | None]:
    """The whole text and why it ended."""
    parts: list[str] = []
    reason: str | None = None
    async for chunk in stream:
        parts.append(chunk.text)
        reason = chunk.finish_reason
    return "".join(parts), reason


def event_stream(
    stream: Stream, shape: Shape, common: dict[str, Any], *, include_usage: bool
) -> EventStream:
    """The streaming answer. With include_usage every event but the last carries `"usage": null`, as
    OpenAI's do.
    """
    prefix = json.dumps({**common, "object": shape.event})[:-1]
    usage_null = ', "usage": null' if include_usage else ""

    def usage_event(ended: Stream) -> bytes:
        usage = json.dumps(usage_json(ended.usage))
        return f'data: {prefix}, "choices": [], "usage": {usage}}}\n\n'.encode()

    choice = f'data: {prefix}, "choices": [{{"index": 0, '

    def tail(finish_reason: str | None) -> str:
        reason = json.dumps(finish_reason)
        return f'{shape.close}, "logprobs": null, "finish_reason": {reason}}}]{usage_null}}}\n\n'

    # Chat clients expect the role before the first text.
    opening = (
        f'{choice}"delta": {{"role": "assistant", "content": ""{tail(None)}'
        if shape is CHAT
        else ""
    )
    return EventStream(
        stream,
        opening=opening.encode(),
        head=choice + shape.head,
        tail=tail,
        usage=usage_event if include_usage else None,
    )
