"""An App behind its listeners (HTTP, the operators' own, gRPC), and the order of a drain. Called by
the command, which has the signals.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import uvloop

from packhorse.serve.access.exposure import check_listeners
from packhorse.serve.app import App, create, first_of
from packhorse.serve.engines.processes import end_children, print_stacks_when_asked
from packhorse.serve.rest.server import LAST_WORDS_S, Listeners
from packhorse.serve.settings import Settings, prepare_environment
from packhorse.serve.signals import LAST_RESORT_S, Signals
from packhorse.serve.telemetry import logs

if TYPE_CHECKING:
    from packhorse.serve.rpc.server import RpcServer

logger = logging.getLogger("packhorse")


def run(settings: Settings) -> None:
    """Serve with uvloop until stopped; see `serve`. Exits with 1 when the engine was given up."""
    prepare_environment()
    print_stacks_when_asked()
    logs.set_up(settings.log_level, settings.log_format, prompts=settings.log_prompts)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(serve(settings))
    if code:
        raise SystemExit(code)


async def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT, then drain and return 0; or 1 when the engine was given up. A
    second signal cuts the drain short.

    HTTP is up while the engine loads: live, but not ready. Raises StartupError when the port or the
    model cannot be had.
    """
    started_s = time.monotonic()
    signals = Signals()
    check_listeners(settings.auth, settings.http, settings.rpc)
    app = create(settings)
    signals.take_hangups(app.reload if app.has_routes else None)
    listeners = Listeners(settings.http, app.asgi, app.admin_asgi, metrics=app.metrics)
    rpc = None
    if settings.rpc.port is not None:
        rpc = app.rpc()
        await rpc.start()
        logger.info("gRPC at %s", rpc.address)
    listeners.start()
    url = listeners.url
    if listeners.admin_url:
        logger.info("Metrics and administration at %s", listeners.admin_url)
    logger.info("Loading %s; %s/health/ready tells when it is there", app.name, url)
    try:
        starting = asyncio.create_task(app.start())
        if await first_of(starting, signals.stop.wait()) is starting:
            starting.result()
            took_s = time.monotonic() - started_s
            logger.info("Serving %s at %s/v1 after %.0f s", app.name, url, took_s)
            await first_of(app.gave_up.wait(), signals.stop.wait())
        app.stop_admitting()
        listeners.drain()
        if rpc is not None:
            await rpc.drain()
        await app.drain(settings.service.drain_timeout_s, signals.hurry)
    finally:
        await _stop(app, listeners, rpc)
    logger.info("Stopped")
    return 1 if app.gave_up.is_set() else 0


async def _stop(app: App, listeners: Listeners, rpc: RpcServer | None) -> None:
    """The engine first, so that requests that are cut off can still be told; then the listeners."""
    try:
        await app.close()
    finally:
        if rpc is not None:
            await rpc.stop(LAST_WORDS_S)
        await listeners.stop()
        await app.close_tracing()
        gc.freeze()  # engines do not bear being torn down after the modules that they use
        end_children()  # nothing is left by now; should something be, Python would wait for it
        if app.is_stuck:  # Python would wait for its thread, too
            ending = threading.Timer(LAST_RESORT_S, os._exit, [1])
            ending.daemon = True
            ending.start()
