"""What every gRPC call goes through: request id, key, admission, deadline, errors, trailers.

Handlers get a `Call`; `Calls.method` makes the method handlers of grpc.aio from them.
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

from packhorse.serve.access.exposure import UNIX, Exposure, Sender
from packhorse.serve.access.keys import Keys
from packhorse.serve.api.errors import unexpected
from packhorse.serve.api.generate import CallContext
from packhorse.serve.errors import Cancelled, Invalid, ServeError, TooLarge
from packhorse.serve.messages import ANONYMOUS, Caller, Scope, Trace
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.request_context import request_id_from
from packhorse.serve.rpc.errors import DETAILS, code_of, details_of, message_of
from packhorse.serve.rpc.lazy_messages import Context, MessageReader
from packhorse.serve.settings.rpc import RpcSettings

if TYPE_CHECKING:
    from packhorse.serve.telemetry.tracing import Tracing

logger = logging.getLogger("packhorse.rpc")

STALLED_STATUS_TIMEOUT_S = 1.0
_STALLED = Cancelled("The client did not read its stream.")

Request = TypeVar("Request", bound=Message)


@dataclass(slots=True)
class Call(Generic[Request]):
    """One call, once its caller is identified."""

    request: Request
    request_id: str
    caller: Caller
    servicer_context: Context
    timeout_s: float | None
    """What is left of the call's deadline."""
    trailers: dict[str, str] = field(default_factory=dict)
    """Trailing metadata; handlers may add to it."""
    trace: Trace | None = None
    sends: int = 0
    """Incremented before and after each send, so it is odd while a send is in progress."""
    has_stalled: bool = False

    @property
    def context(self) -> CallContext:
        """For calls that generate nothing: without a timeout of the request's own."""
        return CallContext(self.request_id, self.caller)

    async def send(self, message: Message) -> None:
        """Send one message of a stream; waits while the client does not read."""
        self.sends += 1
        await self.servicer_context.write(message)
        self.sends += 1


Handler = Callable[[Call[Any]], Awaitable[Message | None]]


class Calls:
    """Makes grpc.aio's method handlers from ours."""

    def __init__(
        self,
        pipeline: Pipeline,
        keys: Keys | None,
        settings: RpcSettings,
        reader: MessageReader,
        tracing: Tracing | None = None,
        *,
        metrics: ServerMetrics | None = None,
    ) -> None:
        """`keys` None: every call is allowed."""
        self._metrics = metrics or ServerMetrics()
        self._tracing = tracing
        self._pipeline = pipeline
        self._keys = keys
        self._settings = settings
        self._reader = reader
        # No hosts: gRPC's server does not report them, and browsers cannot speak gRPC without TLS.
        self._exposure: Exposure | None = None
        if keys is not None and keys.without_keys is not None:
            self._exposure = Exposure(keys.without_keys, metrics=self._metrics)

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
        """`name` is the method's full name; `counts` says whether admission counts its calls."""

        async def run(_: object, context: Context) -> Message | None:
            return await self._run(name, handler, request, context, scope, counts=counts)

        # As if requests were streams, see lazy_messages.py.
        make_handler = (
            grpc.stream_stream_rpc_method_handler
            if streams
            else grpc.stream_unary_rpc_method_handler
        )
        # Bytes are parsed in `_run`: gRPC reports a message that it cannot parse as an internal
        # error.
        return make_handler(run, request_deserializer=bytes, response_serializer=_serialized)

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
        pairs = context.invocation_metadata() or ()
        metadata = dict(pairs)
        request_id = request_id_from(metadata.get("x-request-id"))
        trailers = {"x-request-id": request_id}
        span = None
        if self._tracing is not None and scope == "inference":
            span = self._tracing.begin(
                name,
                pairs,
                **{"rpc.system": "grpc", "rpc.method": name, "packhorse.request_id": request_id},
            )
            trailers["traceparent"] = span.traceparent
        code, is_fault = grpc.StatusCode.OK, False
        caller, permit = ANONYMOUS, None
        watch: asyncio.Task[None] | None = None
        call: Call[Any] | None = None
        try:
            try:
                if self._keys is not None:
                    authorization = metadata.get("authorization")
                    caller = self._keys.caller(
                        None if authorization is None else _bytes(authorization)
                    )
                    self._keys.check_scope(caller, scope)
                if scope == "admin" and self._exposure is not None:
                    self._exposure.check(_sender(context.peer(), pairs))
                if counts:
                    permit = self._pipeline.enter(caller)
                raw = await self._reader.of_caller(context, caller)
                call = Call(
                    self._parsed(kind, raw), request_id, caller, context,
                    context.time_remaining(), trailers, span,
                )  # fmt: skip
            except ServeError as error:
                self._pipeline.refused(request_id, error, caller)
                raise
            watch = asyncio.create_task(self._watch(call, _task()))
            answer = await handler(call)
            context.set_trailing_metadata(tuple(trailers.items()))
            return answer
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            if call is not None and call.has_stalled:
                # gRPC cannot cut off a single call: try to send a status, for a short time.
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(STALLED_STATUS_TIMEOUT_S):
                        await self._fail(context, _STALLED, request_id, trailers)
            raise
        except ServeError as error:
            code, is_fault = code_of(error), error.mapping.http >= 500
            await self._fail(context, error, request_id, trailers)
        except Exception:
            if context.done():  # a send to a client that has left fails
                code = grpc.StatusCode.CANCELLED
                return None
            code, is_fault = grpc.StatusCode.INTERNAL, True
            logger.exception("request_id=%s failed unexpectedly", request_id)
            await self._fail(context, unexpected(), request_id, trailers)
        finally:
            if watch is not None:
                watch.cancel()
            if permit is not None:
                permit.leave()
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
        self, context: Context, error: ServeError, request_id: str, trailers: dict[str, str]
    ) -> None:
        metadata: Iterable[tuple[str, str | bytes]] = (
            *trailers.items(),
            (DETAILS, details_of(error, request_id)),
        )
        await context.abort(code_of(error), message_of(error), tuple(metadata))

    async def _watch(self, call: Call[Any], task: asyncio.Task[Any]) -> None:
        """Cut off a client that reads nothing of its stream."""
        seen = (-1, -1)  # `sends` at the last two looks, each half a timeout apart
        while True:
            await asyncio.sleep(self._settings.stalled_client_timeout_s / 2)
            if call.sends % 2 and seen == (call.sends, call.sends):
                self._metrics.stalled_clients.inc()
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
