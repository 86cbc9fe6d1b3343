"""The gRPC server: its port, TLS, health, reflection, start and stop.

Methods come from the descriptors of proto/: one without a handler here stops the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from packhorse.serve.access.keys import Keys
from packhorse.serve.api.admin import Admin
from packhorse.serve.errors import ServeError, StartupError
from packhorse.serve.messages import Scope
from packhorse.serve.rpc.admin import Operators
from packhorse.serve.rpc.calls import Calls, Handler
from packhorse.serve.rpc.inference import Inference
from packhorse.serve.rpc.lazy_messages import Reading
from packhorse.serve.rpc.pb import admin_pb2, inference_pb2
from packhorse.serve.rpc.public import OpenCalls
from packhorse.serve.service import Service
from packhorse.serve.settings.sections import RpcSettings

if TYPE_CHECKING:
    from packhorse.serve.telemetry.tracing import Tracing

logger = logging.getLogger("packhorse.rpc")

LOOK_EVERY_S = 0.25
# Between what health says and the GOAWAY, so that who watches can leave by itself.
TOLD_FIRST_S = 0.1
# `stop` ends it earlier.
FOREVER_S = 1e6
# Calls of one connection; clients open another for more.
MAX_STREAMS = 1024
HANDSHAKE_TIMEOUT_MS = 20_000
# Calls that only tell, and take no place of admission's, as GET does over HTTP.
UNCOUNTED = {"ListModels"}
INFERENCE: ServiceDescriptor = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
ADMIN: ServiceDescriptor = admin_pb2.DESCRIPTOR.services_by_name["Admin"]


class RpcServer:
    """One port, taken when this is made; make it in the event loop that it is to serve in."""

    def __init__(
        self,
        service: Service,
        admin: Admin | None,
        keys: Keys | None,
        settings: RpcSettings,
        tracing: Tracing | None = None,
    ) -> None:
        """`admin` None: operators' calls are not here. Raises StartupError when the port or the
        certificate is not to be had.
        """
        assert settings.port is not None
        self._service = service
        reading = Reading(settings, service.admission.bodies)
        self._server = grpc.aio.server(
            options=_options(settings, reading.max_bytes),
            maximum_concurrent_rpcs=settings.max_calls,
        )
        calls = Calls(service, keys, settings, reading, tracing)
        methods = {
            INFERENCE: _methods(calls, INFERENCE, Inference(service).handlers(), "inference")
        }
        if admin is not None:
            methods[ADMIN] = _methods(calls, ADMIN, Operators(admin).handlers(), "admin")
        for descriptor, handlers in methods.items():
            made = grpc.method_handlers_generic_handler(descriptor.full_name, handlers)
            self._server.add_generic_rpc_handlers((made,))
        names = ("", *(descriptor.full_name for descriptor in methods))
        self._open = OpenCalls(reading, names, reflects=settings.reflection)
        self._server.add_generic_rpc_handlers(self._open.handlers())
        self.address = self._listen(settings)
        self._watching: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    def _listen(self, settings: RpcSettings) -> str:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.port}"
        try:
            if settings.tls_certificate is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, _credentials(settings))
        except (RuntimeError, OSError) as error:
            raise StartupError(
                f"Cannot listen on {address} for gRPC: {error}; choose another rpc.host or "
                "--grpc-port, and look at the certificate if there is one."
            ) from error
        if not port:
            raise StartupError(
                f"Cannot listen on {address} for gRPC; choose another rpc.host or --grpc-port."
            )
        return f"{host}:{port}"

    async def start(self) -> None:
        """Answer from now on."""
        await self._look()
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        """Tell who watches the health whether new requests are taken."""
        try:
            await self._service.check_ready()
        except ServeError:
            self._open.tell(serves=False)
        else:
            self._open.tell(serves=True)

    async def drain(self) -> None:
        """Send every client to another server: health says so first, then connections get a GOAWAY,
        and new ones are not taken. Calls in flight go on until `stop`.
        """
        self._open.tell(serves=False, finally_=True)
        await asyncio.sleep(TOLD_FIRST_S)
        if self._ending is None:
            self._ending = asyncio.create_task(self._server.stop(FOREVER_S))

    async def stop(self, grace_s: float) -> None:
        """Answer no more. What still runs has this long to end."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        self._open.tell(serves=False, finally_=True)
        await self._server.stop(grace_s)
        if self._ending is not None:
            await self._ending


def _methods(
    calls: Calls, service: ServiceDescriptor, handlers: dict[str, Handler], scope: Scope
) -> dict[str, grpc.RpcMethodHandler]:
    known = {method.name for method in service.methods}
    if known != set(handlers):
        raise RuntimeError(f"{service.full_name}: {known ^ set(handlers)} only on one side")
    return {
        method.name: calls.method(
            f"{service.full_name}/{method.name}",
            handlers[method.name],
            GetMessageClass(method.input_type),
            scope=scope,
            streams=method.server_streaming,
            counts=scope == "inference" and method.name not in UNCOUNTED,
        )
        for method in service.methods
    }


def _options(settings: RpcSettings, max_bytes: int) -> list[tuple[str, Any]]:
    keep_alive_ms = round(settings.keep_alive_s * 1000)
    ages = [
        (f"grpc.max_connection_{what}_ms", round(seconds * 1000))
        for what, seconds in (
            ("age", settings.max_connection_age_s),
            ("age_grace", settings.max_connection_age_grace_s),
            ("idle", settings.max_connection_idle_s),
        )
        if seconds is not None
    ]
    return [
        ("grpc.max_receive_message_length", max_bytes),
        # What a call may send before it is read: HTTP/2's least, and not more where the line is
        # fast. A message that is being read gets a window of its own size.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_concurrent_streams", min(settings.max_calls, MAX_STREAMS)),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        *ages,
        ("grpc.max_send_message_length", -1),
        # Long answers have long pauses: pings find out whether the client is there.
        ("grpc.keepalive_time_ms", keep_alive_ms),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        # And clients may ping as often as they like, down to this.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),
    ]


def _credentials(settings: RpcSettings) -> grpc.ServerCredentials:
    """Raises StartupError."""
    files = (settings.tls_key, settings.tls_certificate, settings.client_ca)
    key, certificate, client_ca = (None if path is None else _read(path) for path in files)
    assert key is not None
    assert certificate is not None
    return grpc.ssl_server_credentials(
        [(key, certificate)], client_ca, require_client_auth=client_ca is not None
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"rpc: {path} cannot be read: {error.strerror}.") from error
