"""Health and reflection, which need no key: bounded in number and message size, and no client can
delay another.

grpc_health's own servicer writes to its watchers while it holds their lock: a watcher that does not
read would block the others, and the server's stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from packhorse.serve.rpc.lazy_messages import Context, MessageReader

# Health watches last long: they must not use up the calls that a server may have.
MAX_CALLS = 256
WRITE_TIMEOUT_S = 20.0

Method = Callable[[Context], Awaitable[Any]]


class PublicCalls:
    """Health and reflection of one server. `report` sets the health of all `names`."""

    def __init__(self, reader: MessageReader, names: Iterable[str], *, reflects: bool) -> None:
        self._reader = reader
        self._names = frozenset(names)
        self._serves = False
        self._changed = asyncio.Event()
        self._is_final = False
        self._calls = 0
        self._reflection = None
        if reflects:
            shown = (*sorted(self._names - {""}), health.SERVICE_NAME, reflection.SERVICE_NAME)
            self._reflection = reflection.aio.ReflectionServicer(shown)

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        methods = {
            # Never refused because of others' watches: orchestrators restart a server without it.
            "Check": self._method(
                self._check, health_pb2.HealthCheckRequest, streams=False, lasts=False
            ),
            "Watch": self._method(self._watch, health_pb2.HealthCheckRequest, streams=True),
        }
        made = [grpc.method_handlers_generic_handler(health.SERVICE_NAME, methods)]
        if self._reflection is not None:
            kind = reflection_pb2.ServerReflectionRequest
            info = {"ServerReflectionInfo": self._method(self._reflect, kind, streams=True)}
            made.append(grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, info))
        return tuple(made)

    def report(self, *, serves: bool, finally_: bool = False) -> None:
        """Set the health from now on; with `finally_`, later reports are ignored."""
        if self._is_final:
            return
        self._is_final = finally_
        if serves == self._serves:
            return
        self._serves = serves
        self._changed.set()
        self._changed = asyncio.Event()

    def _method(
        self, call: Method, kind: Any, *, streams: bool, lasts: bool = True
    ) -> grpc.RpcMethodHandler:
        async def run(_: Any, context: Context) -> Any:
            if lasts and self._calls >= MAX_CALLS:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{MAX_CALLS} calls for health and reflection are there, the limit; try again.",
                )
            self._calls += lasts
            try:
                return await call(context)
            except DecodeError:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"The message is not a valid {kind.DESCRIPTOR.name}.",
                )
            finally:
                self._calls -= lasts

        made = (
            grpc.stream_stream_rpc_method_handler
            if streams
            else grpc.stream_unary_rpc_method_handler
        )
        return made(run, request_deserializer=bytes, response_serializer=_serialized)

    async def _check(self, context: Context) -> Any:
        name = await self._name(context)
        if name not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service here.")
        return health_pb2.HealthCheckResponse(status=self._status())

    def _status(self) -> Any:
        known = health_pb2.HealthCheckResponse
        return known.SERVING if self._serves else known.NOT_SERVING

    async def _watch(self, context: Context) -> None:
        is_known = await self._name(context) in self._names
        last = None
        while True:
            changed = self._changed
            status = self._status()
            if not is_known:
                status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                await self._write(context, health_pb2.HealthCheckResponse(status=status))
            last = status
            await changed.wait()

    async def _name(self, context: Context) -> str:
        raw = await self._reader.of_anybody(context)
        if raw is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The call has no message.")
        name: str = health_pb2.HealthCheckRequest.FromString(raw).service
        return name

    async def _reflect(self, context: Context) -> None:
        assert self._reflection is not None

        async def requests() -> AsyncIterator[Any]:
            while (raw := await self._reader.of_anybody(context)) is not grpc.aio.EOF:
                yield reflection_pb2.ServerReflectionRequest.FromString(raw)

        async for answer in self._reflection.ServerReflectionInfo(requests(), context):
            await self._write(context, answer)

    async def _write(self, context: Context, message: Any) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await context.write(message)
        except TimeoutError:
            await context.abort(grpc.StatusCode.CANCELLED, "The client reads nothing.")


def _serialized(message: Any) -> bytes:
    raw: bytes = message.SerializeToString()
    return raw
