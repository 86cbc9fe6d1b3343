"""The only place that builds things: settings -> engine -> service -> HTTP. Also signals and the
drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
import uvloop

from serve.engines import ENGINES
from serve.engines.base import Engine
from serve.errors import StartupError
from serve.rest.app import build_app
from serve.service import Service
from serve.settings import HttpSettings, Settings, prepare_environment

logger = logging.getLogger("packhorse")


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling, because we drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(settings: HttpSettings) -> socket.socket:
    """Take the port. Raises StartupError when it is not to be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"Cannot listen on {settings.host}:{settings.port}: {error.strerror}; "
            "choose another --host or --port."
        ) from error
    return listener


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, then drain and return. A second signal cuts the drain short.

    HTTP is up while the engine loads: live, but not ready. A signal in that time takes effect when
    the engine has loaded. Raises StartupError when the port or the model cannot be had.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    started_s = time.monotonic()
    name = settings.service.served_model_name or default_name(settings)
    service = Service(name)
    listener = bind(settings.http)
    config = uvicorn.Config(
        build_app(service, settings.http),
        log_config=None,
        access_log=False,
        lifespan="off",
        # After the drain only what the drain gave up on is left.
        timeout_graceful_shutdown=2,
    )
    http = _Uvicorn(config)
    running = asyncio.create_task(http.serve(sockets=[listener]))
    url = address(listener)
    logger.info("Loading %s; %s/health/ready tells when it is there", name, url)
    engine: Engine | None = None
    try:
        build = ENGINES[settings.engine.kind]
        engine = await asyncio.to_thread(build, settings.model, name, settings.engine)
        # What the start has made stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        service.attach(engine)
        took_s = time.monotonic() - started_s
        logger.info("Serving %s at %s/v1 after %.0f s", name, url, took_s)
        await stop.wait()
        await _drain(service, settings.service.drain_timeout_s, hurry)
    finally:
        http.should_exit = True
        await running
        if engine is not None:
            await engine.close()
    logger.info("Stopped")


async def _drain(service: Service, timeout_s: float, hurry: asyncio.Event) -> None:
    """Refuse new requests and wait for those in flight, at most timeout_s or until `hurry`."""
    service.stop_admitting()
    logger.info("Draining for at most %.0f s", timeout_s)
    draining = asyncio.create_task(service.drain(timeout_s))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    if not (draining.done() and draining.result()):
        logger.warning("Aborting the requests that are still running")
    for task in (draining, hurrying):
        task.cancel()


def default_name(settings: Settings) -> str:
    """The folder's own name, also for `.` and `../x/`; without a folder, the engine's kind."""
    return Path(settings.model).resolve().name if settings.model else settings.engine.kind


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
