"""Where the server listens: the public port, the operators' own, TLS. The only user of uvicorn.

Called by `main`, which decides when to start and when to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from serve.errors import StartupError
from serve.sections import HttpSettings

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
        self._servers = [_server(settings, app)]
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
            self._servers.append(_server(settings, admin_app))
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

    async def stop(self) -> None:
        """Answer no more. What still runs has a moment to end, and is then cut off."""
        for server in self._servers:
            server.should_exit = True
        await asyncio.gather(*self._running)
        for taken in self._sockets:
            taken.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling, because we drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(settings: HttpSettings, app: ASGIApp) -> _Uvicorn:
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=LAST_WORDS_S,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )
    return _Uvicorn(config)


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
