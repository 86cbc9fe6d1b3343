"""Where the server listens: the public port, the operators' own, TLS. uvicorn is used here and in
`connections` only.

Called by `main`, which decides when to start and when to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from packhorse.serve.errors import StartupError
from packhorse.serve.rest.accepting import Acceptor
from packhorse.serve.rest.connections import Connection, Connections
from packhorse.serve.rest.tolerant import TolerantConnection
from packhorse.serve.settings.sections import HttpSettings
from starlette.types import ASGIApp

logger = logging.getLogger("packhorse.http")

# Of open files: what suits thousands of connections, and what everything else may need.
ENOUGH_FILES, OTHER_FILES = 65536, 512
# After the drain and the engine's end only the last words are left.
LAST_WORDS_S = 2


class Listeners:
    """One or two ports, taken when this is made. `start`, and `stop` when all has been said."""

    def __init__(
        self, settings: HttpSettings, app: ASGIApp, admin_app: ASGIApp | None = None
    ) -> None:
        """`admin_app` goes to admin_port. Raises StartupError when a port or the certificate is not
        to be had.
        """
        check_certificate(settings)
        self._sockets = [bind(settings.host, settings.port, fix="choose another --host or --port")]
        self._connections = Connections(settings, connections_possible(settings.max_connections))
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
        """The public one, without a slash at its end."""
        return self._urls[0]

    @property
    def admin_url(self) -> str | None:
        """The operators' own, if they have one."""
        return self._urls[1] if len(self._urls) > 1 else None

    def start(self) -> None:
        """Answer from now on."""
        self._running = [
            asyncio.create_task(server.serve(sockets=[taken]))
            for server, taken in zip(self._servers, self._sockets, strict=True)
        ]

    def drain(self) -> None:
        """Send clients to another server: from now on every answer closes its connection."""
        self._connections.drain()

    async def stop(self) -> None:
        """Answer no more. What still runs has a moment to end, and is then cut off."""
        for server in self._servers:
            server.should_exit = True
        await asyncio.gather(*self._running)
        for taken in self._sockets:
            taken.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling, because we drain first, and with our connections."""

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()

        def make() -> Connection:
            return TolerantConnection(
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


def _server(settings: HttpSettings, app: ASGIApp, connections: Connections) -> _Uvicorn:
    config = uvicorn.Config(
        app,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        proxy_headers=False,  # who calls is who has connected; a header would say what it likes
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=LAST_WORDS_S,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    return _Uvicorn(config, connections)


def connections_possible(wanted: int) -> int:
    """How many of them the system's limit on open files leaves, which is raised as far as it may be
    and is useful.
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
    """Take the port. Raises StartupError, which ends with `fix`, when it is not to be had."""
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
    """Raises StartupError for a certificate or key that uvicorn could not load later."""
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
        # An encrypted key would ask for its password on the terminal, where nobody sits.
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise StartupError(
            f"http.tls_certificate {settings.tls_certificate} and http.tls_key {settings.tls_key} "
            f"are not a PEM certificate chain and its unencrypted key: {error}."
        ) from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
