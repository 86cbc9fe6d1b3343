"""The only place that builds things: settings -> engine -> service -> listeners. Also the order of
a drain.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import threading
import time
from collections.abc import Awaitable
from pathlib import Path

import uvloop
from packhorse.serve import metrics
from packhorse.serve.access.exposure import check_listeners
from packhorse.serve.access.keys import Keys
from packhorse.serve.adapters.allowed_roots import hub_cache
from packhorse.serve.adapters.folder_watch import Watch
from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.adapters.store import Store
from packhorse.serve.api.admin import Admin
from packhorse.serve.cache import STORES
from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.engine_builder import Builder
from packhorse.serve.engines.processes import end_children, print_stacks_when_asked
from packhorse.serve.engines.supervisor import Supervisor
from packhorse.serve.errors import ServeError, StartupError
from packhorse.serve.limits.admission import Admission
from packhorse.serve.rest.app import build_admin_app, build_app
from packhorse.serve.rest.server import LAST_WORDS_S, Listeners
from packhorse.serve.routing.base import AUTO
from packhorse.serve.routing.router import Router
from packhorse.serve.routing.table_cache import Kept
from packhorse.serve.service import Service
from packhorse.serve.settings import Settings, answer_environment, prepare_environment, shown
from packhorse.serve.settings.sections import CacheSettings
from packhorse.serve.signals import LAST_RESORT_S, Signals
from packhorse.serve.telemetry import logs
from packhorse.serve.telemetry.logs import RequestLog
from packhorse.serve.telemetry.machine import LoopLag
from packhorse.serve.tenancy import Tenancy

logger = logging.getLogger("packhorse")

TABLES = ".routes"  # beside the adapters in their store; no adapter's name


async def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT, then drain and return 0; or 1 when the engine was given up. A
    second signal cuts the drain short.

    HTTP is up while the engine loads: live, but not ready. Raises StartupError when the port or the
    model cannot be had.
    """
    loop = asyncio.get_running_loop()
    signals = Signals()
    stop, hurry = signals.stop, signals.hurry
    metrics.TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
    lag = LoopLag()
    metrics.LOOP_LAG.set_function(lag.worst)
    started_s = time.monotonic()
    name = settings.service.served_model_name or default_name(settings)
    registry = build_registry(settings, name)
    router = build_router(settings, registry)
    signals.take_hangups(router.reload_soon if router else None)
    given = settings.cache.secret
    secret = given.get_secret_value().encode() if given else secrets.token_bytes(32)
    cache = build_cache(settings.cache, secret)
    tracing = None
    if settings.tracing.endpoint is not None:
        from packhorse.serve.telemetry.tracing import tracing_of  # takes a moment to import

        tracing = tracing_of(settings.tracing)
        logger.info("Traces go to %s", settings.tracing.endpoint)
    service = Service(
        name,
        admission=Admission(settings.admission),
        adapters=registry,
        routing=router,
        cache=cache,
        tenancy=Tenancy(secret),
        log=RequestLog(prompts=settings.log_prompts),
        request_timeout_s=settings.service.request_timeout_s,
        max_request_timeout_s=settings.service.max_request_timeout_s,
    )
    check_listeners(settings.auth, settings.http, settings.rpc)
    keys = Keys(settings.auth)
    admin = Admin(registry, router, cache, model=name, settings=shown(settings))
    listeners = Listeners(
        settings.http,
        build_app(service, settings.http, keys, admin, tracing),
        build_admin_app(service, settings.http, keys, admin),
    )
    rpc = None
    if settings.rpc.port is not None:
        from packhorse.serve.rpc.server import RpcServer  # takes a moment to import

        with_admin = settings.rpc.admin
        if with_admin is None:
            with_admin = settings.http.admin_port is None
        rpc = RpcServer(service, admin if with_admin else None, keys, settings.rpc, tracing)
        await rpc.start()
        logger.info("gRPC at %s", rpc.address)
    listeners.start()
    url = listeners.url
    if listeners.admin_url:
        logger.info("Metrics and administration at %s", listeners.admin_url)
    logger.info("Loading %s; %s/health/ready tells when it is there", name, url)
    environment = answer_environment()  # vLLM adds to it
    builder = Builder(settings, name, cache, environment)
    supervisor = Supervisor(builder.build, settings.supervisor)
    looking = asyncio.create_task(lag.watch())
    watching: list[asyncio.Task[None]] = []
    try:
        starting = asyncio.create_task(_start(supervisor, builder, registry, router, settings))
        if await _first_of(starting, stop.wait()) is starting:
            watching = starting.result()
            if cache is not None:
                await cache.start()
                watching.append(asyncio.create_task(cache.watch()))
            capacity = supervisor.capacity
            service.admission.fit(capacity.max_num_seqs, capacity.kv_cache_tokens)
            service.attach(supervisor)
            took_s = time.monotonic() - started_s
            logger.info("Serving %s at %s/v1 after %.0f s", name, url, took_s)
            await _first_of(supervisor.gave_up.wait(), stop.wait())
        service.stop_admitting()
        listeners.drain()
        if rpc is not None:
            await rpc.drain()
        if not supervisor.gave_up.is_set():
            await _drain(service, settings.service.drain_timeout_s, hurry)
    finally:
        for task in (looking, *watching):
            task.cancel()
        try:
            # Before HTTP, so that what is cut off can still be told.
            await supervisor.close()
            if cache is not None:
                await cache.close()
        finally:
            if rpc is not None:
                await rpc.stop(LAST_WORDS_S)
            await listeners.stop()
            if tracing is not None:
                await tracing.close()
            gc.freeze()  # engines do not bear being torn down after the modules that they use
            end_children()  # nothing is left by now; should something be, Python would wait for it
            if supervisor.is_stuck:  # Python would wait for its thread, too
                ending = threading.Timer(LAST_RESORT_S, os._exit, [1])
                ending.daemon = True
                ending.start()
    logger.info("Stopped")
    return 1 if supervisor.gave_up.is_set() else 0


def build_registry(settings: Settings, name: str) -> Registry | None:
    """The adapters, if the settings have any. Raises StartupError."""
    folder = settings.adapters.folder
    if folder is not None and not folder.is_dir():
        raise StartupError(f"adapters.folder {folder} is not a folder.")
    store_folder = settings.adapters.store_folder
    if store_folder is None:
        return None
    roots = settings.adapters.allowed_roots
    roots = (hub_cache(),) if roots is None else roots
    return Registry(
        Store(store_folder),
        max_registered=settings.adapters.max_registered,
        max_resident=settings.engine.max_cpu_loras,
        turn_tokens=settings.adapters.turn_tokens,
        max_running=settings.adapters.max_running,
        taken=frozenset({name, AUTO}),
        allowed_roots=(folder, *roots) if folder is not None else roots,
    )


def build_router(settings: Settings, registry: Registry | None) -> Router | None:
    """Routing by text, where there are adapters. Raises StartupError."""
    file = settings.routing.file
    if file is not None and not file.is_file():
        raise StartupError(f"routing.file {file} is not a file.")
    store_folder = settings.adapters.store_folder
    if registry is None or store_folder is None or not settings.routing.enabled:
        return None
    return Router(
        file,
        registry.folders,
        registry,
        known=lambda: [card.name for card in registry.cards()],
        takes_base_name=settings.routing.base_name,
        train=Kept(store_folder / TABLES),
    )


async def _start(
    supervisor: Supervisor,
    builder: Builder,
    registry: Registry | None,
    router: Router | None,
    settings: Settings,
) -> list[asyncio.Task[None]]:
    """The engine, its adapters, the routes to them; returns what goes on beside requests. Raises
    StartupError.
    """
    await supervisor.start()
    if registry is None:
        return []
    layers = await asyncio.to_thread(builder.layers)
    limits = AdapterLimits(
        max_rank=supervisor.capacity.max_lora_rank,
        layers=layers,
        max_bytes=settings.adapters.max_bytes,
    )
    capacity = supervisor.capacity
    waiting = settings.adapters.max_waiting or capacity.max_num_seqs
    await registry.start(
        supervisor,
        limits,
        slots=capacity.max_loras,
        extra_slots=capacity.loras_at_work - capacity.max_loras,
        few_requests=capacity.max_num_seqs,  # all fit in it
        max_waiting=waiting,
    )
    watching = []
    if settings.adapters.folder is not None:
        watch = Watch(settings.adapters.folder, registry)
        await watch.look(wait=False)
        watching.append(watch.run())
    if router is not None:
        try:
            await router.start()
        except ServeError as error:
            raise StartupError(f"The routes cannot be built: {error.message}") from error
        watching.append(router.watch())
    watching.append(registry.warm())
    return [asyncio.create_task(task) for task in watching]


def build_cache(settings: CacheSettings, secret: bytes) -> ResultCache | None:
    """The result cache. Raises StartupError."""
    if not settings.enabled:
        return None
    store = None
    if settings.store is not None:
        url = settings.store.get_secret_value()
        try:
            make = STORES[url.partition("://")[0]]
            store = make(url, settings.prefix, settings.timeout_s)
        except ValueError:
            # Not what the library says: it quotes parts of the URL, a password's among them.
            raise StartupError(
                "cache.store is not understood; give redis://USER:PASSWORD@HOST:PORT/DB or "
                "memcached://HOST:PORT, and a password's /, ?, # and @ as %2F, %3F, %23 and %40."
            ) from None
    return ResultCache(
        secret,
        memory_bytes=settings.memory_bytes,
        max_entry_bytes=settings.max_entry_bytes,
        ttl_s=settings.ttl_s,
        store=store,
    )


async def _first_of(*waits: Awaitable[object]) -> asyncio.Future[object]:
    """Wait until one of them is done, and return that; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return done.pop()


async def _drain(service: Service, timeout_s: float, hurry: asyncio.Event) -> None:
    """Wait for the requests in flight, at most timeout_s or until `hurry`."""
    logger.info("Draining for at most %.0f s", timeout_s)
    draining = asyncio.ensure_future(service.drain(timeout_s))
    if await _first_of(draining, hurry.wait()) is not draining or not draining.result():
        logger.warning("Aborting the requests that are still running")


def default_name(settings: Settings) -> str:
    """The folder's own name, also for `.` and `../x/`; without a folder, the engine's kind."""
    return Path(settings.model).resolve().name if settings.model else settings.engine.kind


def run(settings: Settings) -> None:
    """Serve with uvloop until stopped; see `serve`. Exits with 1 when the engine was given up."""
    prepare_environment()
    print_stacks_when_asked()
    logs.set_up(settings.log_level, settings.log_format, prompts=settings.log_prompts)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(serve(settings))
    if code:
        raise SystemExit(code)
