"""POST /v1/chat/completions, /v1/completions, /invocations and /v1/route: the same flow, with one
encoder per API.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.fields import CacheOptions
from packhorse.serve.api.generate import (
    CallContext,
    RefusalsCounted,
    answer_metadata,
    collect,
    requests_of,
)
from packhorse.serve.api.models import decide_route
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import AUTO_CACHE, CacheMode, CachePolicy, Caller, GenerateRequest
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.pipeline import Pipeline, Stream
from packhorse.serve.rest.openapi import body_document, documented
from packhorse.serve.rest.requests import BodyLimits, ClientWatch, read_body, read_object
from packhorse.serve.rest.responses import (
    ChatEncoder,
    ChoiceEvents,
    CompletionEncoder,
    Encoder,
    json_response,
)
from packhorse.serve.rest.sse import EventStream
from packhorse.serve.settings.http import HttpSettings

SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


class Api(NamedTuple):
    """What the flow needs of one API."""

    body: type[ChatBody] | type[CompletionBody]
    encoder: Callable[[Any], Encoder]


CHAT = Api(ChatBody, ChatEncoder)
COMPLETIONS = Api(CompletionBody, CompletionEncoder)


class PlainRoute(APIRoute):
    """Calls its endpoint with the request alone. FastAPI's own way of finding an endpoint's
    arguments costs a tenth of an answer from the cache.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def routes(pipeline: Pipeline, settings: HttpSettings, metrics: ServerMetrics) -> APIRouter:
    """The endpoints over one pipeline."""
    router = APIRouter(route_class=PlainRoute)
    limits = BodyLimits(settings, pipeline.admission.bodies)

    @router.post(
        "/v1/chat/completions",
        responses=documented("ChatCompletion", streams=True),
        openapi_extra=body_document(ChatBody),
    )
    async def chat_completions(request: Request) -> Response:
        return await respond(request, lambda _: CHAT)

    @router.post(
        "/v1/completions",
        responses=documented("Completion", streams=True),
        openapi_extra=body_document(CompletionBody),
    )
    async def completions(request: Request) -> Response:
        return await respond(request, lambda _: COMPLETIONS)

    @router.post("/invocations", include_in_schema=False)
    async def invocations(request: Request) -> Response:
        """SageMaker's one path for every API: the fields of the body decide which one it is."""
        return await respond(
            request,
            lambda document: COMPLETIONS if document.get("messages") is None else CHAT,
        )

    @router.post(
        "/v1/route", responses=documented("Decision"), openapi_extra=body_document(ChatBody)
    )
    async def route(request: Request) -> Response:
        """Where this chat completion would go, and why; nothing is generated."""
        state = request.state
        with RefusalsCounted(pipeline, state.request_id, state.caller):
            body = await read_body(request, ChatBody, limits, settings.unknown_fields)
        context = CallContext(state.request_id, state.caller)
        return JSONResponse(asdict(decide_route(pipeline, body, context)))

    async def respond(request: Request, api_of: Callable[[dict[str, Any]], Api]) -> Response:
        """The answer of the API that the document is for."""
        state = request.state
        request_id: str = state.request_id
        caller: Caller = state.caller
        with RefusalsCounted(pipeline, request_id, caller):
            document = await read_object(request, limits)
            api = api_of(document)
            body = validated(document, api.body, settings.unknown_fields)
            context = CallContext(
                request_id,
                caller,
                timeout_of(request, body.timeout_s),
                cache_policy(request, body.cache),
                getattr(state, "trace", None),
            )
            requests = requests_of(pipeline, body, context)
        encoder = api.encoder(body)
        if body.stream:
            events = ChoiceEvents(
                encoder,
                request_id,
                include_usage=body.include_usage,
                continuous_usage=body.continuous_usage,
            )
            return EventStream(
                partial(pipeline.start_all, requests),
                events,
                stalled_client_timeout_s=settings.stalled_client_timeout_s,
                heartbeat_s=settings.heartbeat_s,
                headers=headers,
                metrics=metrics,
            )
        async with ClientWatch(request.scope, request.receive):
            return await whole(requests, encoder, request_id)

    async def whole(
        requests: Sequence[GenerateRequest], encoder: Encoder, request_id: str
    ) -> Response:
        streams = await pipeline.start_all(requests)
        choices = await collect(streams)
        document = encoder.whole(request_id, streams, choices)
        return json_response(document, headers(streams))

    def headers(streams: Sequence[Stream]) -> dict[str, str]:
        return answer_metadata(pipeline, streams)

    return router


def timeout_of(request: Request, field_s: float | None) -> float | None:
    """The shorter of the header and the field, in seconds. Raises Invalid for a header that is not
    a number; the pipeline checks its range.
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
    """The field and the header Cache-Control combined: the field's mode, or else the header's; the
    lower age of the two. Raises Invalid.
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
