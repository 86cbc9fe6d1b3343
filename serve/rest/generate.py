"""POST /v1/chat/completions and /v1/completions: the same flow, two shapes of answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from packhorse.serve.api.answers import collect, headers_of, names_of
from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.fields import CacheOptions
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import Invalid, ServeError
from packhorse.serve.messages import AUTO_CACHE, CacheMode, CachePolicy, Caller, GenerateRequest
from packhorse.serve.rest.openapi import answers, body_document
from packhorse.serve.rest.requests import (
    BodyLimits,
    begun,
    read_body,
    read_object,
    unless_disconnected,
)
from packhorse.serve.rest.responses import (
    ChatShape,
    Shape,
    TextShape,
    common_fields,
    whole_document,
)
from packhorse.serve.rest.sse import EventStream
from packhorse.serve.service import Service
from packhorse.serve.settings.sections import HttpSettings
from packhorse.serve.stream import Stream

Body = TypeVar("Body", ChatBody, CompletionBody)

SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


class PlainRoute(APIRoute):
    """Calls its endpoint with the request and nothing more: what FastAPI does before, to find out
    what an endpoint wants, is a tenth of what an answer from the cache costs.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def routes(service: Service, settings: HttpSettings) -> APIRouter:
    """Both endpoints over one service."""
    router = APIRouter(route_class=PlainRoute)
    limits = BodyLimits(
        settings.max_body_bytes, settings.stalled_client_timeout_s, service.admission.bodies
    )

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

    @router.post("/invocations", include_in_schema=False)
    async def invocations(request: Request) -> Response:
        """SageMaker's one path for all: the body says what it is."""
        try:
            document = await read_object(request, limits)
            is_chat = document.get("messages") is not None
            if is_chat:
                chat = validated(document, ChatBody, settings.unknown_fields)
            else:
                text = validated(document, CompletionBody, settings.unknown_fields)
        except ServeError as error:
            service.refused(request.state.request_id, error, request.state.caller)
            raise
        if is_chat:
            return await answer(request, chat, ChatShape(chat))
        return await answer(request, text, TextShape(text))

    @router.post("/v1/route", responses=answers("Decision"), openapi_extra=body_document(ChatBody))
    async def route(request: Request) -> Response:
        """Where this chat completion would go, and why; nothing is generated."""
        body = await checked(request, ChatBody)
        caller: Caller = request.state.caller
        (asked,) = body.to_requests(
            request.state.request_id, caller, default_model=service.models.default(caller)
        )
        decision = service.models.decide(asked)
        return JSONResponse({"model": decision.adapter or service.model, **asdict(decision)})

    async def checked(request: Request, schema: type[Body]) -> Body:
        try:
            return await read_body(request, schema, limits, settings.unknown_fields)
        except ServeError as error:
            service.refused(request.state.request_id, error, request.state.caller)
            raise

    async def answer(request: Request, body: ChatBody | CompletionBody, shape: Shape) -> Response:
        request_id: str = request.state.request_id
        caller: Caller = request.state.caller
        try:
            asked = body.to_requests(
                request_id,
                caller,
                timeout_of(request, body.timeout_s),
                cache_policy(request, body.cache),
                default_model=service.models.default(caller),
            )
        except ServeError as error:
            service.refused(request_id, error, caller)
            raise
        trace = getattr(request.state, "trace", None)
        if trace is not None:
            asked = [replace(one, trace=trace) for one in asked]
        if body.stream:
            return EventStream(
                await begun(request.receive, service.start_all(asked), settings.heartbeat_s),
                shape,
                lambda streams: common_fields(shape, request_id, names_of(streams)),
                include_usage=body.include_usage,
                continuous_usage=body.continuous_usage,
                stalled_client_timeout_s=settings.stalled_client_timeout_s,
                heartbeat_s=settings.heartbeat_s,
                headers=headers,
            )
        return await unless_disconnected(request.receive, whole(asked, shape, request_id))

    async def whole(asked: Sequence[GenerateRequest], shape: Shape, request_id: str) -> Response:
        streams = await service.start_all(asked)
        try:
            choices = await collect(streams)
        finally:
            for stream in streams:
                await stream.close()
        common = common_fields(shape, request_id, names_of(streams))
        document = whole_document(shape, common, choices, streams)
        return Response(document, media_type="application/json", headers=headers(streams))

    def headers(streams: Sequence[Stream]) -> dict[str, str]:
        return headers_of(
            streams, has_adapters=service.models.has_adapters, has_cache=service.has_cache
        )

    return router


def timeout_of(request: Request, field_s: float | None) -> float | None:
    """The shorter of header and field, in seconds. Raises Invalid for a header that is no number;
    the service checks its size.
    """
    header = request.headers.get("x-request-timeout-s")
    if header is None:
        return field_s
    if not SECONDS.fullmatch(header):
        raise Invalid(
            "The header x-request-timeout-s is not a number of seconds; send for example 30 or 2.5."
        )
    return float(header) if field_s is None else min(float(header), field_s)


def cache_policy(request: Request, field: CacheOptions | None) -> CachePolicy:
    """What the field and the header Cache-Control ask for, taken together: the field's mode, or
    else the header's; the lower age of the two. Raises Invalid.
    """
    header = request.headers.get("cache-control")
    if header is None:
        return field.policy() if field else AUTO_CACHE
    mode: CacheMode = "auto"
    ages = [] if field is None or field.max_age_s is None else [field.max_age_s]
    for directive in header.lower().split(","):
        name, _, value = directive.strip().partition("=")
        if name == "no-store":
            mode = "off"
        elif name == "no-cache" and mode != "off":
            mode = "refresh"
        elif name == "max-age":
            if not SECONDS.fullmatch(value):
                raise Invalid(
                    "max-age in the header Cache-Control is not a number of seconds; send for "
                    "example max-age=60."
                )
            ages.append(float(value))
    if field is not None and field.mode != "auto":
        mode = field.mode
    return CachePolicy(mode, min(ages, default=None))
