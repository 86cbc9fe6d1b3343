"""OpenAI's Responses API: a response as JSON or as events, and what has become of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from packhorse.serve.api.generate import CallContext, RefusalsCounted, answer_metadata
from packhorse.serve.api.responses.answer import Event
from packhorse.serve.api.responses.body import ResponseBody
from packhorse.serve.api.responses.service import Call, Responses, metadata_of
from packhorse.serve.errors import Invalid, ServeError
from packhorse.serve.messages import Chunk
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.pipeline import Pipeline, Stream
from packhorse.serve.rest.generate import PlainRoute, cache_policy, timeout_of
from packhorse.serve.rest.openapi import body_document, documented
from packhorse.serve.rest.requests import BodyLimits, ClientWatch, read_body
from packhorse.serve.rest.responses import json_response
from packhorse.serve.rest.sse import EventStream
from packhorse.serve.settings.http import HttpSettings

DEFAULT_LISTED = 20
# Text -> JSON string.
_quote: Callable[[str], str] = json.encoder.encode_basestring_ascii


def routes(
    pipeline: Pipeline, settings: HttpSettings, responses: Responses, metrics: ServerMetrics
) -> APIRouter:
    """The endpoints over one pipeline and its kept responses."""
    others = APIRouter()
    limits = BodyLimits(settings, pipeline.admission.bodies)
    router = APIRouter(route_class=PlainRoute)
    metrics.responses_in_background.set_function(lambda: responses.in_background)

    @router.post(
        "/v1/responses",
        responses=documented("Response", streams=True),
        openapi_extra=body_document(ResponseBody),
    )
    async def create(request: Request) -> Response:
        state = request.state
        with RefusalsCounted(pipeline, state.request_id, state.caller):
            call = await responses.prepare(*await read(request))
            if call.body.runs_in_background:
                return json_response(responses.submit(call), headers(call, ()))
        if call.body.stream:
            return EventStream(
                partial(responses.start, call),
                ResponseEvents(responses, call),
                stalled_client_timeout_s=settings.stalled_client_timeout_s,
                heartbeat_s=settings.heartbeat_s,
                headers=partial(headers, call),
                metrics=metrics,
            )
        async with ClientWatch(request.scope, request.receive):
            streams = await responses.whole(call)
        return json_response(call.answer.document(), headers(call, streams))

    @router.post(
        "/v1/responses/input_tokens",
        responses=documented("InputTokens"),
        openapi_extra=body_document(ResponseBody),
    )
    async def input_tokens(request: Request) -> Response:
        """How many tokens the prompt of this response would have; nothing is generated."""
        count = await responses.count_tokens(*await read(request))
        return json_response({"object": "response.input_tokens", "input_tokens": count})

    @others.get("/v1/responses/{response_id}", responses=documented("Response"))
    async def retrieve(request: Request, response_id: str) -> Response:
        """A response that was stored, or one in the background as it is now."""
        if request.query_params.get("stream", "").lower() in ("1", "true"):
            raise Invalid(
                "stream: a stored response is not streamed again; leave stream out, and ask again "
                "while its status is queued or in_progress.",
                param="stream",
            )
        found = await responses.get(request.state.caller, response_id)
        return json_response(found.response)

    @others.delete("/v1/responses/{response_id}", responses=documented("ResponseDeleted"))
    async def delete(request: Request, response_id: str) -> Response:
        await responses.delete(request.state.caller, response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @others.post("/v1/responses/{response_id}/cancel", responses=documented("Response"))
    async def cancel(request: Request, response_id: str) -> Response:
        """End a response in the background."""
        return json_response(await responses.cancel(request.state.caller, response_id))

    @others.get("/v1/responses/{response_id}/input_items", responses=documented("ResponseItems"))
    async def input_items(request: Request, response_id: str) -> Response:
        """What the model was told: the items of the request, and those before them."""
        query = request.query_params
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise Invalid("order: send asc or desc.", param="order")
        said = query.get("limit", str(DEFAULT_LISTED))
        if not (said.isascii() and said.isdigit() and len(said) < 10):
            raise Invalid("limit: send a number from 1 to 100.", param="limit")
        page = await responses.input_items(
            request.state.caller,
            response_id,
            limit=int(said),
            after=query.get("after"),
            ascending=order == "asc",
        )
        items = page.items
        return json_response(
            {
                "object": "list",
                "data": items,
                "first_id": items[0]["id"] if items else "",
                "last_id": items[-1]["id"] if items else "",
                "has_more": page.has_more,
            }
        )

    async def read(request: Request) -> tuple[ResponseBody, CallContext]:
        """The body of a request, and what else it says."""
        state = request.state
        body = await read_body(request, ResponseBody, limits, settings.unknown_fields)
        context = CallContext(
            state.request_id,
            state.caller,
            timeout_of(request, body.timeout_s),
            cache_policy(request, body.cache),
            getattr(state, "trace", None),
        )
        return body, context

    def headers(call: Call, streams: Sequence[Stream]) -> dict[str, str]:
        if streams:
            return metadata_of(call, answer_metadata(pipeline, streams))
        ignored = call.requests[0].ignored
        return metadata_of(call, {"x-packhorse-ignored": ", ".join(ignored)} if ignored else {})

    router.include_router(others)
    return router


class ResponseEvents:
    """The events of one streamed response, numbered from 0. Satisfies the protocol Events.

    `event` writes a token of plain text itself: of all its bytes only the text and the number are
    new. There is no [DONE]: a stream ends with response.completed, .incomplete or .failed.
    """

    def __init__(self, responses: Responses, call: Call) -> None:
        self._responses = responses
        self._call = call
        self._answer = call.answer
        self._streams: Sequence[Stream] = ()
        self._number = 0
        self._has_begun = False
        self._last_fields: dict[str, Any] | None = None
        self._last = ""
        # Of the message that is being written: the head of its events, and its texts so far.
        self._head = ""
        self._texts: list[str] | None = None

    def begin(self, streams: Sequence[Stream]) -> bytes:
        self._streams = streams
        self._responses.begun(self._call, streams)
        return self._opening()

    def _opening(self) -> bytes:
        self._has_begun = True
        return self._encoded(self._answer.opening())

    def plain(self) -> tuple[str, str] | None:
        return None  # every event has a number

    def event(self, number: int, chunk: Chunk) -> bytes:
        texts = self._texts
        if (
            texts is not None
            and chunk.finish_reason is None
            and chunk.logprobs is None
            and chunk.reasoning is None
            and not chunk.tool_calls
        ):
            text = chunk.text
            texts.append(text)
            self._number = number = self._number + 1
            return f'{self._head}{number - 1}, "delta": {_quote(text)}}}\n\n'.encode()
        encoded = self._encoded(self._answer.add(chunk))
        written = self._answer.open_text
        if written is None:
            self._texts = None
        elif self._texts is not written[2]:
            item_id, index, self._texts = written
            self._head = (
                "event: response.output_text.delta\n"
                'data: {"type": "response.output_text.delta", '
                f'"item_id": {_quote(item_id)}, "output_index": {index}, "content_index": 0, '
                '"logprobs": [], "sequence_number": '
            )
        return encoded

    def end(self) -> bytes:
        self._responses.ended(self._call, self._streams)
        return self._encoded([self._answer.ending()])

    def fail(self, error: ServeError) -> bytes:
        before = b""
        if not self._has_begun:
            self._answer.begin(self._call.requests[0].model, None)
            before = self._opening()
        self._answer.fail(error)
        self._responses.keep(self._call)
        told = {"code": error.openai_code, "message": error.message, "param": error.param}
        return before + self._encoded([("error", told), self._answer.ending()])

    def _encoded(self, events: Sequence[Event]) -> bytes:
        encoded = []
        for kind, fields in events:
            if fields is not self._last_fields:  # two events of the opening have the same
                self._last_fields, self._last = fields, json.dumps(fields)
            encoded.append(
                f'event: {kind}\ndata: {{"type": "{kind}", "sequence_number": {self._number}, '
                f"{self._last[1:]}\n\n"
            )
            self._number += 1
        return "".join(encoded).encode()
