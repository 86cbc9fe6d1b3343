"""POST /v1/chat/completions and /v1/completions: the same flow, two shapes of answer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import TypeVar

from fastapi import APIRouter, Request, Response

from serve.errors import ServeError
from serve.messages import GenerateRequest
from serve.rest.body import read_body, unless_disconnected
from serve.rest.chat_schema import ChatBody
from serve.rest.documents import answers, body_document
from serve.rest.schema import CompletionBody
from serve.rest.shapes import Answer, ChatShape, Shape, TextShape, common_fields, whole_document
from serve.rest.sse import EventStream
from serve.service import Service, Stream, merged

Body = TypeVar("Body", ChatBody, CompletionBody)


def routes(service: Service, *, max_body_bytes: int) -> APIRouter:
    """Both endpoints over one service."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        responses=answers("ChatCompletion", streams=True),
        openapi_extra=body_document(ChatBody),
    )
    async def chat_completions(request: Request) -> Response:
        body = await checked(request, ChatBody)
        return await answer(request, body, ChatShape(body))

    @router.post(
        "/v1/completions",
        responses=answers("Completion", streams=True),
        openapi_extra=body_document(CompletionBody),
    )
    async def completions(request: Request) -> Response:
        body = await checked(request, CompletionBody)
        return await answer(request, body, TextShape(body))

    async def checked(request: Request, schema: type[Body]) -> Body:
        try:
            return await read_body(request, schema, max_bytes=max_body_bytes)
        except ServeError as error:
            service.refused(request.state.request_id, error)
            raise

    async def answer(request: Request, body: ChatBody | CompletionBody, shape: Shape) -> Response:
        request_id: str = request.state.request_id
        try:
            asked = body.to_requests(request_id)
        except ServeError as error:
            service.refused(request_id, error)
            raise
        if body.stream:
            streams = await unless_disconnected(request.receive, service.start_all(asked))
            return EventStream(
                streams,
                shape,
                common_fields(shape, request_id, streams[0].route.model),
                include_usage=body.include_usage,
                continuous_usage=body.continuous_usage,
            )
        document = await unless_disconnected(request.receive, whole(asked, shape, request_id))
        return Response(document, media_type="application/json")

    async def whole(asked: Sequence[GenerateRequest], shape: Shape, request_id: str) -> bytes:
        streams = await service.start_all(asked)
        try:
            choices = await collect(streams)
        finally:
            for stream in streams:
                await stream.close()
        common = common_fields(shape, request_id, streams[0].route.model)
        return whole_document(shape, common, choices, streams)

    return router


async def collect(streams: Sequence[Stream]) -> dict[int, Answer]:
    """All choices, by index, to their ends. Raises ServeError."""
    choices: dict[int, Answer] = {}
    per_prompt = streams[0].request.sampling.n
    async with aclosing(merged(streams)) as chunks:
        async for number, chunk in chunks:
            choices.setdefault(number * per_prompt + chunk.index, Answer()).add(chunk)
    return choices
