"""What every call has, whatever it asks: an id, a caller, a place, a time, errors, and an end.

Handlers are written against `Call`; `unary` and `streaming` make of them what grpc.aio takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError, Message
from packhorse.serve import metrics
from packhorse.serve.access.exposure import UNIX, Exposure, Sender
from packhorse.serve.access.keys import Keys, check_scope
from packhorse.serve.errors import Cancelled, Invalid, ServeError, TooLarge
from packhorse.serve.messages import ANONYMOUS, Caller, Scope, Trace
from packhorse.serve.rpc.errors import DETAILS, code_of, details_of, message_of, unexpected
from packhorse.serve.rpc.lazy_messages import Reading
from packhorse.serve.service import Service, request_id_from
from packhorse.serve.settings.sections import RpcSettings

if TYPE_CHECKING:
    from packhorse.serve.telemetry.tracing import Tracing

logger = logging.getLogger("packhorse.rpc")

LAST_WORD_S = 1.0
_STALLED = Cancelled("The client did not read its stream.")

Request = TypeVar("Request", bound=Message)
Context = Any  # grpc.aio.ServicerContext; grpc has no types


@dataclass(slots=True)
class Call(Generic[Request]):
    """One call, once it is known who makes it."""

    request: Request
    request_id: str
    caller: Caller
    context: Context
    timeout_s: float | None
    marks: dict[str, str] = field(default_factory=dict)
    """What goes out with the trailers."""
    trace: Trace | None = None
    sends: int = 0
    """Goes up before and after each message that is sent, so it is odd while one is on its way."""
    has_stalled: bool = False

    async def send(self, message: Message) -> None:
        """Send one message of a stream; waits while the client does not read."""
        self.sends += 1
        await self.context.write(message)
        self.sends += 1


Handler = Callable[[Call[Any]], Awaitable[Message | None]]


class Calls:
    """Makes method handlers of handlers."""

    def __init__(
        self,
        service: Service,
        keys: Keys | None,
        settings: RpcSettings,
        reading: Reading,
        tracing: Tracing | None = None,
    ) -> None:
        """`keys` None: everybody may do everything."""
        self._tracing = tracing
        self._service = service
        self._keys = keys
        self._settings = settings
        self._reading = reading
        # No hosts: gRPC's server does not tell them, and browsers cannot speak gRPC without TLS.
        self._exposure: Exposure | None = None
        if keys is not None and keys.without_keys is not None:
            self._exposure = Exposure(keys.without_keys)

    def method(
        self,
        name: str,
        handler: Handler,
        request: type[Message],
        *,
        scope: Scope,
        streams: bool,
        counts: bool,
    ) -> grpc.RpcMethodHandler:
        """`name` is its full one; `counts`: whether the call takes one of the places that admission
        has.
        """

        async def run(_: object, context: Context) -> Message | None:
            return await self._run(name, handler, request, context, scope, counts=counts)

        # As if requests were streams, see reading.py.
        made = (
            grpc.stream_stream_rpc_method_handler
            if streams
            else grpc.stream_unary_rpc_method_handler
        )
        # Bytes are parsed in `_run`: what gRPC itself cannot parse it calls an internal error.
        return made(run, request_deserializer=bytes, response_serializer=_serialized)

    async def _run(
        self,
        name: str,
        handler: Handler,
        kind: type[Message],
        context: Context,
        scope: Scope,
        *,
        counts: bool,
    ) -> Message | None:
        sent_with = context.invocation_metadata() or ()
        metadata = dict(sent_with)
        request_id = request_id_from(metadata.get("x-request-id"))
        marks = {"x-request-id": request_id}
        span = None
        if self._tracing is not None and scope == "inference":
            span = self._tracing.begin(
                name,
                sent_with,
                **{"rpc.system": "grpc", "rpc.method": name, "packhorse.request_id": request_id},
            )
            marks["traceparent"] = span.traceparent
        code, is_fault = grpc.StatusCode.OK, False
        caller, place = ANONYMOUS, None
        watch: asyncio.Task[None] | None = None
        call: Call[Any] | None = None
        try:
            try:
                if self._keys is not None:
                    sent = metadata.get("authorization")
                    caller = self._keys.caller(None if sent is None else _bytes(sent))
                check_scope(caller, scope)
                if scope == "admin" and self._exposure is not None:
                    self._exposure.check(_sender(context.peer(), sent_with))
                if counts:
                    place = self._service.enter(caller)
                raw = await self._reading.of_caller(context, caller)
                call = Call(
                    self._parsed(kind, raw), request_id, caller, context,
                    context.time_remaining(), marks, span,
                )  # fmt: skip
            except ServeError as error:
                self._service.refused(request_id, error, caller)
                raise
            watch = asyncio.create_task(self._watch(call, _task()))
            answer = await handler(call)
            context.set_trailing_metadata(tuple(marks.items()))
            return answer
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            if call is not None and call.has_stalled:
                # gRPC has no way to hang up on one call; this is the last it hears of us.
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(LAST_WORD_S):
                        await self._fail(context, _STALLED, request_id, marks)
            raise
        except ServeError as error:
            code, is_fault = code_of(error), error.wire.http >= 500
            await self._fail(context, error, request_id, marks)
        except Exception:
            if context.done():  # what is sent to a client that has left fails
                code = grpc.StatusCode.CANCELLED
                return None
            code, is_fault = grpc.StatusCode.INTERNAL, True
            logger.exception("request_id=%s failed unexpectedly", request_id)
            await self._fail(context, unexpected(), request_id, marks)
        finally:
            if watch is not None:
                watch.cancel()
            if place is not None:
                place.leave()
            if span is not None:
                span.end(name, failed=is_fault, **{"rpc.grpc.status_code": code.value[0]})
        return None

    def _parsed(self, kind: type[Message], raw: bytes) -> Any:
        """Raises TooLarge, Invalid."""
        limit = self._settings.max_message_bytes
        if len(raw) > limit:
            raise TooLarge(
                f"The message has {len(raw)} bytes, above the limit of {limit}; send less."
            )
        try:
            return kind.FromString(raw)
        except DecodeError as error:
            raise Invalid(f"The message is not a valid {kind.DESCRIPTOR.name}.") from error

    async def _fail(
        self, context: Context, error: ServeError, request_id: str, marks: dict[str, str]
    ) -> None:
        trailers: Iterable[tuple[str, str | bytes]] = (
            *marks.items(),
            (DETAILS, details_of(error, request_id)),
        )
        await context.abort(code_of(error), message_of(error), tuple(trailers))

    async def _watch(self, call: Call[Any], task: asyncio.Task[Any]) -> None:
        """Cut off a client that takes nothing of its stream."""
        seen = (-1, -1)  # at the last two looks: one send has been on its way for two halves
        while True:
            await asyncio.sleep(self._settings.stalled_client_timeout_s / 2)
            if call.sends % 2 and seen == (call.sends, call.sends):
                metrics.STALLED_CLIENTS.inc()
                logger.info("request_id=%s its client reads nothing; cut off", call.request_id)
                call.has_stalled = True
                task.cancel()
                return
            seen = (seen[1], call.sends)


def _task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _sender(peer: str, metadata: Iterable[tuple[str, str | bytes]]) -> Sender:
    """gRPC writes `ipv4:127.0.0.1:5000`, `ipv6:%5B::1%5D:5000` and `unix:PATH`."""
    kind, _, rest = unquote(peer).partition(":")
    address = rest.rpartition(":")[0].removeprefix("[").removesuffix("]")
    headers = [(name, value) for name, value in metadata if isinstance(value, str)]
    return Sender(UNIX if kind.startswith(UNIX) else address, headers)
