"""The gRPC server: its port, TLS, health, reflection, start and stop.

Methods come from the descriptors of proto/. A method without a handler, or a handler without a
method, stops the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from packhorse.serve.access.keys import Keys
from packhorse.serve.api.admin import Admin
from packhorse.serve.errors import ServeError, StartupError
from packhorse.serve.messages import Scope
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.rpc.admin import Operators
from packhorse.serve.rpc.calls import Calls
from packhorse.serve.rpc.inference import Inference
from packhorse.serve.rpc.lazy_messages import MessageReader
from packhorse.serve.rpc.pb import admin_pb2, inference_pb2
from packhorse.serve.rpc.public import PublicCalls
from packhorse.serve.settings.rpc import RpcSettings

if TYPE_CHECKING:
    from packhorse.serve.telemetry.tracing import Tracing

logger = logging.getLogger("packhorse.rpc")

LOOK_EVERY_S = 0.25
# Between the health report and the GOAWAY, so that watching clients can leave by themselves.
TOLD_FIRST_S = 0.1
# `stop` ends it earlier.
FOREVER_S = 1e6
# Calls at once on one connection; clients open another for more.
MAX_STREAMS = 1024
HANDSHAKE_TIMEOUT_MS = 20_000
# Calls that admission does not count, as it does not count GET over HTTP.
UNCOUNTED = {"ListModels"}
INFERENCE: ServiceDescriptor = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
ADMIN: ServiceDescriptor = admin_pb2.DESCRIPTOR.services_by_name["Admin"]


class RpcServer:
    """One port, bound when this is made. Make it in the event loop that it serves in."""

    def __init__(
        self,
        pipeline: Pipeline,
        admin: Admin | None,
        keys: Keys | None,
        settings: RpcSettings,
        tracing: Tracing | None = None,
        *,
        metrics: ServerMetrics | None = None,
    ) -> None:
        """`admin` None: there are no operators' calls. Raises StartupError when the port cannot be
        bound or the certificate cannot be loaded.
        """
        assert settings.port is not None
        self._pipeline = pipeline
        reader = MessageReader(settings, pipeline.admission.bodies)
        self._server = grpc.aio.server(
            options=_options(settings, reader.max_bytes),
            maximum_concurrent_rpcs=settings.max_calls,
        )
        calls = Calls(pipeline, keys, settings, reader, tracing, metrics=metrics)
        methods = {INFERENCE: _methods(calls, INFERENCE, Inference(pipeline), "inference")}
        if admin is not None:
            methods[ADMIN] = _methods(calls, ADMIN, Operators(admin), "admin")
        for descriptor, handlers in methods.items():
            made = grpc.method_handlers_generic_handler(descriptor.full_name, handlers)
            self._server.add_generic_rpc_handlers((made,))
        names = ("", *(descriptor.full_name for descriptor in methods))
        self._public = PublicCalls(reader, names, reflects=settings.reflection)
        self._server.add_generic_rpc_handlers(self._public.handlers())
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
        """Accept and answer from now on."""
        await self._look()
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        """Report to health watchers whether new requests are accepted."""
        try:
            await self._pipeline.check_ready()
        except ServeError:
            self._public.report(serves=False)
        else:
            self._public.report(serves=True)

    async def drain(self) -> None:
        """Send every client to another server: health reports NOT_SERVING, then connections get a
        GOAWAY and new ones are refused. Calls in flight go on until `stop`.
        """
        self._public.report(serves=False, finally_=True)
        await asyncio.sleep(TOLD_FIRST_S)
        if self._ending is None:
            self._ending = asyncio.create_task(self._server.stop(FOREVER_S))

    async def stop(self, grace_s: float) -> None:
        """Stop. Calls that still run have this long to end."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        self._public.report(serves=False, finally_=True)
        await self._server.stop(grace_s)
        if self._ending is not None:
            await self._ending


def _methods(
    calls: Calls, service: ServiceDescriptor, handlers: object, scope: Scope
) -> dict[str, grpc.RpcMethodHandler]:
    """The service's methods; the handler of `ListModels` is `handlers.list_models`."""
    names = {method.name: _snake_case(method.name) for method in service.methods}
    public = {name for name in dir(handlers) if not name.startswith("_")}
    if unmatched := public ^ set(names.values()):
        raise RuntimeError(f"{service.full_name}: {sorted(unmatched)} only on one side")
    return {
        method.name: calls.method(
            f"{service.full_name}/{method.name}",
            getattr(handlers, names[method.name]),
            GetMessageClass(method.input_type),
            scope=scope,
            streams=method.server_streaming,
            counts=scope == "inference" and method.name not in UNCOUNTED,
        )
        for method in service.methods
    }


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


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
        # A call may send one window before it is read: HTTP/2's smallest, also on a fast line. A
        # message that is being read gets a window of its own size.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_concurrent_streams", min(settings.max_calls, MAX_STREAMS)),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        *ages,
        ("grpc.max_send_message_length", -1),
        # Long answers have long pauses; pings find out whether the client is still there.
        ("grpc.keepalive_time_ms", keep_alive_ms),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        # How often clients may ping.
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
