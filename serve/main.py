"""The only place that builds things: settings -> engine -> service -> HTTP. Also signals and the
drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
import uvloop

from serve.engines import ENGINES
from serve.errors import StartupError
from serve.rest.app import build_app
from serve.service import Service
from serve.settings import HttpSettings, Settings, prepare_environment

logger = logging.getLogger("packhorse")


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handling, because we drain first; and it tells when it listens."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(settings: HttpSettings) -> socket.socket:
    """Take the port before the engine's half minute of loading. Raises StartupError when it is not
    to be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise StartupError(
            f"Cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
            "choose another --host or --port."
        ) from error
    return listener


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, then drain and return. A second signal cuts the drain short.

    Raises StartupError when the port or the model cannot be had.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    listener = bind(settings.http)
    started_s = time.monotonic()
    name = settings.service.served_model_name or Path(settings.model).name or settings.engine.kind
    logger.info("Loading %s", settings.model or "no model: this is the echo engine")
    engine = await asyncio.to_thread(
        ENGINES[settings.engine.kind], settings.model, name, settings.engine
    )
    try:
        if not stop.is_set():
            await _serve_http(Service(engine, name), settings, listener, stop, hurry, started_s)
    finally:
        listener.close()
        await engine.close()
    logger.info("Stopped")


async def _serve_http(
    service: Service,
    settings: Settings,
    listener: socket.socket,
    stop: asyncio.Event,
    hurry: asyncio.Event,
    started_s: float,
) -> None:
    config = uvicorn.Config(
        build_app(service, settings.http),
        log_config=None,
        access_log=False,
        lifespan="off",
        # After the drain only what the drain gave up on is left.
        timeout_graceful_shutdown=2,
    )

    def on_listening() -> None:
        host, port = listener.getsockname()[:2]
        took_s = time.monotonic() - started_s
        logger.info("Serving %s at http://%s:%d/v1 after %.0f s", service.model, host, port, took_s)

    http = _Uvicorn(config, on_listening)
    running = asyncio.create_task(http.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    service.stop_admitting()
    logger.info("Draining for at most %.0f s", settings.service.drain_timeout_s)
    draining = asyncio.create_task(service.drain(settings.service.drain_timeout_s))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    if not (draining.done() and draining.result()):
        logger.warning("Aborting the requests that are still running")
    for task in (draining, hurrying):
        task.cancel()
    http.should_exit = True
    await running


def run(settings: Settings) -> None:
    """Serve with uvloop until stopped; see `serve`."""
    prepare_environment()
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        force=True,
    )
    # What vllm says while it is imported, before it reads its own log level.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    # Its "Started server process" lines repeat ours.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings))
