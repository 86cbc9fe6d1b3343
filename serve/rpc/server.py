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
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.admin import Admin
from serve.auth import Keys
from serve.errors import ServeError, StartupError
from serve.messages import Scope
from serve.rpc.admin import Operators
from serve.rpc.calls import Calls, Handler
from serve.rpc.inference import Inference
from serve.rpc.pb import admin_pb2, inference_pb2
from serve.sections import RpcSettings
from serve.service import Service

if TYPE_CHECKING:
    from serve.tracing import Tracing

logger = logging.getLogger("packhorse.rpc")

LOOK_EVERY_S = 0.25
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
        self._server = grpc.aio.server(
            options=_options(settings), maximum_concurrent_rpcs=settings.max_calls
        )
        calls = Calls(service, keys, settings, tracing)
        methods = {
            INFERENCE: _methods(calls, INFERENCE, Inference(service).handlers(), "inference")
        }
        if admin is not None:
            methods[ADMIN] = _methods(calls, ADMIN, Operators(admin).handlers(), "admin")
        for descriptor, handlers in methods.items():
            made = grpc.method_handlers_generic_handler(descriptor.full_name, handlers)
            self._server.add_generic_rpc_handlers((made,))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = ("", *(descriptor.full_name for descriptor in methods))
        if settings.reflection:
            shown = (*self._names[1:], health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(shown, self._server)
        self.address = self._listen(settings)
        self._watching: asyncio.Task[None] | None = None

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
        status = health_pb2.HealthCheckResponse.SERVING
        try:
            await self._service.check_ready()
        except ServeError:
            status = health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Answer no more. What still runs has this long to end."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


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


def _options(settings: RpcSettings) -> list[tuple[str, Any]]:
    keep_alive_ms = round(settings.keep_alive_s * 1000)
    return [
        # Above our own limit, so that it is we who refuse, and say why.
        ("grpc.max_receive_message_length", 2 * settings.max_message_bytes + 2**20),
        ("grpc.max_concurrent_streams", settings.max_calls),
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
