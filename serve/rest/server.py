"""The HTTP listeners: the public port, the operators' own, TLS, and how connections are accepted
within their limit. uvicorn is used here and in connections.py only.

The caller decides when to start and when to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from http import HTTPStatus

import uvicorn
from starlette.types import ASGIApp

from packhorse.serve.errors import StartupError, Unavailable
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.rest.connections import Connection, Connections
from packhorse.serve.rest.errors import raw_error_response
from packhorse.serve.settings.http import HttpSettings

logger = logging.getLogger("packhorse.http")

# Open files: enough for thousands of connections, and what everything else may need.
ENOUGH_FILES, OTHER_FILES = 65536, 512
# How long requests may still run in `stop`, after the drain and the engine's end.
LAST_WORDS_S = 2
ACCEPTS_AT_ONCE = 64  # before the event loop runs other callbacks
ACCEPT_AGAIN_S = 1.0  # after the system had no file descriptor left
SHUTDOWN_S = 1.0  # for the client's answer to the end of TLS


class Listeners:
    """One or two ports, bound when this is made, and their servers."""

    def __init__(
        self,
        settings: HttpSettings,
        app: ASGIApp,
        admin_app: ASGIApp | None = None,
        *,
        metrics: ServerMetrics | None = None,
    ) -> None:
        """`admin_app` is served at admin_port. Raises StartupError when a port cannot be bound or
        the certificate cannot be loaded.
        """
        check_certificate(settings)
        self._sockets = [bind(settings.host, settings.port, fix="choose another --host or --port")]
        self._connections = Connections(
            settings, connections_possible(settings.max_connections), metrics
        )
        self._servers = [_server(settings, app, self._connections)]
        if admin_app is not None and settings.admin_port is not None:
            try:
                self._sockets.append(
                    bind(
                        settings.admin_host,
                        settings.admin_port,
                        fix="choose another http.admin_host or http.admin_port",
                    )
                )
            except StartupError:
                self._sockets[0].close()
                raise
            self._servers.append(_server(settings, admin_app, self._connections))
        scheme = "https" if settings.tls_certificate else "http"
        self._urls = [f"{scheme}://{_address(taken)}" for taken in self._sockets]
        self._running: list[asyncio.Task[None]] = []

    @property
    def url(self) -> str:
        """The public URL, without a trailing slash."""
        return self._urls[0]

    @property
    def admin_url(self) -> str | None:
        """The URL of the operators' own port, if they have one."""
        return self._urls[1] if len(self._urls) > 1 else None

    def start(self) -> None:
        """Accept and answer from now on."""
        self._running = [
            asyncio.create_task(server.serve(sockets=[taken]))
            for server, taken in zip(self._servers, self._sockets, strict=True)
        ]

    def drain(self) -> None:
        """From now on every answer closes its connection, so that clients go to another server."""
        self._connections.drain()

    async def stop(self) -> None:
        """Stop. Requests that still run have LAST_WORDS_S to end and are then aborted."""
        for server in self._servers:
            server.should_exit = True
        await asyncio.gather(*self._running)
        for taken in self._sockets:
            taken.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn with our connections, and without signal handling, because a drain comes first."""

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()

        def make() -> Connection:
            return Connection(
                self._connections,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )

        self.servers = [
            Acceptor(taken, self._connections, make, self.config.ssl)  # type: ignore[misc]
            for taken in sockets or ()
        ]
        self.started = True


class Acceptor:
    """Accepts the connections of one listening socket; uvicorn closes it like asyncio's Server."""

    def __init__(
        self,
        listener: socket.socket,
        connections: Connections,
        make: Callable[[], Connection],
        certificate: ssl.SSLContext | None,
    ) -> None:
        self._listener = listener
        self._connections = connections
        self._make = make
        self._certificate = certificate
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[Handshake] = set()
        self._again: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
        if self._again is not None:
            self._again.cancel()
        for handshake in list(self._handshakes):
            handshake.cut("closing")

    async def wait_closed(self) -> None:
        """Part of asyncio.Server's interface; there is nothing to wait for."""

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                peer, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("No connection can be taken: %s", error.strerror)
                self._loop.remove_reader(self._listener)
                self._again = self._loop.call_later(ACCEPT_AGAIN_S, self._accept_again)
                return
            peer.setblocking(False)
            if self._connections.enter():
                Handshake(peer, self._connections, self._handshakes).begin(
                    self._make, self._certificate
                )
            else:
                _refuse(peer, can_answer=self._certificate is None)

    def _accept_again(self) -> None:
        self._again = None
        self._loop.add_reader(self._listener, self._accept)


class Handshake:
    """A connection until it is established; with TLS, until the handshake is complete."""

    def __init__(
        self, peer: socket.socket, connections: Connections, running: set[Handshake]
    ) -> None:
        self._peer = peer
        self._connections = connections
        self._running = running
        self._task: asyncio.Task[None] | None = None
        self._made: Connection | None = None

    def begin(self, make: Callable[[], Connection], certificate: ssl.SSLContext | None) -> None:
        def protocol() -> Connection:
            self._made = make()
            return self._made

        self._running.add(self)
        self._task = asyncio.create_task(self._run(protocol, certificate))
        self._task.add_done_callback(self._ended)
        if certificate is not None:
            self._connections.waits(self)

    def cut(self, reason: str) -> None:
        assert self._task is not None
        self._task.cancel()

    async def _run(
        self, protocol: Callable[[], Connection], certificate: ssl.SSLContext | None
    ) -> None:
        with contextlib.suppress(OSError):  # ssl.SSLError is one
            self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                protocol,
                self._peer,
                ssl=certificate,
                # A client that is cut off may not answer, and would count until it does.
                ssl_shutdown_timeout=SHUTDOWN_S if certificate else None,
            )

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._running.discard(self)
        self._connections.works(self)
        if self._made is None or self._made.transport is None:  # else see connection_lost
            self._peer.close()
            self._connections.leave()


def _refuse(peer: socket.socket, *, can_answer: bool) -> None:
    """Close a connection above the limit, with a 503 where no TLS handshake is needed first."""
    try:
        if can_answer:
            peer.send(
                raw_error_response(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    Unavailable(
                        "The server has as many connections as it takes; try again soon.",
                        retry_after_s=1,
                    ),
                )
            )
            # Closing a socket with unread bytes makes the kernel reset it, and the answer is lost.
            peer.recv(2**16)
    except OSError:
        pass
    finally:
        peer.close()


def _server(settings: HttpSettings, app: ASGIApp, connections: Connections) -> _Uvicorn:
    config = uvicorn.Config(
        app,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        proxy_headers=False,  # the caller is the peer; a header could claim anything
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=LAST_WORDS_S,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    return _Uvicorn(config, connections)


def connections_possible(wanted: int) -> int:
    """How many of the wanted connections the system's limit on open files allows. The soft limit is
    raised as far as is possible and useful.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = hard if hard != resource.RLIM_INFINITY else ENOUGH_FILES
    if soft != resource.RLIM_INFINITY and soft < min(allowed, ENOUGH_FILES):
        soft = min(allowed, ENOUGH_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft - OTHER_FILES < wanted:
        possible = max(soft - OTHER_FILES, soft // 2)
        logger.warning(
            "http.max_connections is %d and the limit on open files %d: at most %d connections are "
            "taken; raise the limit (ulimit -n)",
            wanted, soft, possible,
        )  # fmt: skip
        return possible
    return wanted


def bind(host: str, port: int, *, fix: str) -> socket.socket:
    """Bind and listen. Raises StartupError, which ends with `fix`, when that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise StartupError(f"Cannot listen on {host}:{port}: {error.strerror}; {fix}.") from error
    return listener


def check_certificate(settings: HttpSettings) -> None:
    """Raises StartupError for a certificate or key that uvicorn could not load."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return
    for name, path in (
        ("http.tls_certificate", settings.tls_certificate),
        ("http.tls_key", settings.tls_key),
    ):
        if not path.is_file():
            raise StartupError(f"{name} = {path}: no such file.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # OpenSSL would ask for an encrypted key's password on the terminal.
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise StartupError(
            f"http.tls_certificate {settings.tls_certificate} and http.tls_key {settings.tls_key} "
            f"are not a PEM certificate chain and its unencrypted key: {error}."
        ) from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
