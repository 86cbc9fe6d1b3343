"""A server as an object: built from settings, started, stopped. It has no sockets and owns no
signals, so that it can run under `packhorse serve`, in a test, or in another host's process, beside
others of its kind.

    app = create(settings)        # refuses what is wrong with the settings
    ... app.asgi                  # the users' HTTP API, live from now on, not ready
    await app.start()             # the engine, its adapters, the routes to them, the cache
    await app.stop(drain_s=30)    # refuse what is new, let what runs end, let the engine go
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packhorse.serve.access.keys import Keys
from packhorse.serve.accounting import Accounting
from packhorse.serve.adapters.allowed_roots import hub_cache
from packhorse.serve.adapters.folder_watch import FolderWatch
from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.adapters.store import AdapterStore
from packhorse.serve.api.admin import Admin
from packhorse.serve.api.batches import Batches
from packhorse.serve.api.responses.service import Responses
from packhorse.serve.api.responses.store import ResponseStore
from packhorse.serve.batches.gate import Gate
from packhorse.serve.batches.records import Owner
from packhorse.serve.batches.runner import Runner
from packhorse.serve.batches.store import BatchStore
from packhorse.serve.cache import STORES
from packhorse.serve.cache.response_store import MemoryResponses, SharedResponses
from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.engine_builder import Builder
from packhorse.serve.engines.supervisor import Supervisor
from packhorse.serve.engines.vllm import patches
from packhorse.serve.errors import ServeError, StartupError
from packhorse.serve.limits.admission import Admission
from packhorse.serve.messages import Caller
from packhorse.serve.metrics import ModelMetrics, ServerMetrics
from packhorse.serve.models import Model, Models
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.rest.app import build_admin_app, build_app
from packhorse.serve.rest.in_process import InProcess
from packhorse.serve.routing.base import AUTO
from packhorse.serve.routing.router import Router
from packhorse.serve.routing.table_cache import TableCache
from packhorse.serve.settings import Settings, answer_environment, shown
from packhorse.serve.settings.cache import CacheSettings
from packhorse.serve.settings.responses import ResponsesSettings
from packhorse.serve.telemetry.logs import RequestLog
from packhorse.serve.telemetry.machine import LoopLag
from packhorse.serve.tenancy import Tenancy

if TYPE_CHECKING:
    from packhorse.serve.rpc.server import RpcServer

logger = logging.getLogger("packhorse")


LINE_BYTES = 16 * 1024  # of a batch's line, besides the body of its call
TABLES = ".routes"  # beside the adapters in their store; no adapter's name


def create(settings: Settings) -> App:
    """The server of these settings, not started. Call it in the event loop that it is to serve in.
    Raises StartupError.
    """
    return App(settings)


class App:
    """See above."""

    def __init__(self, settings: Settings) -> None:
        """Raises StartupError."""
        self.settings = settings
        self.name = settings.service.served_model_name or default_name(settings)
        """What clients ask for."""
        self.metrics = ServerMetrics()
        self.metrics.watch_machine()
        counted = ModelMetrics(self.name)
        secret = _secret(settings.cache)
        self._registry = build_registry(settings, self.name, counted)
        self._router = build_router(settings, self._registry, counted)
        self._cache = build_cache(settings.cache, secret, counted)
        self._tracing = None
        if settings.tracing.endpoint is not None:
            from packhorse.serve.telemetry.tracing import tracing_of  # takes a moment to import

            self._tracing = tracing_of(settings.tracing)
            logger.info("Traces go to %s", settings.tracing.endpoint)
        self.model = Model(
            self.name,
            adapters=self._registry,
            routing=self._router,
            cache=self._cache,
            admission=Admission(settings.admission, metrics=counted, server_metrics=self.metrics),
            metrics=counted,
        )
        self.pipeline = Pipeline(
            Models(self.model),
            tenancy=Tenancy(secret),
            accounting=Accounting(RequestLog(prompts=settings.log_prompts)),
            request_timeout_s=settings.service.request_timeout_s,
            max_request_timeout_s=settings.service.max_request_timeout_s,
            max_inputs=settings.service.max_inputs,
        )
        self._keys = Keys(settings.auth, metrics=self.metrics)
        self._admin = Admin(
            self._registry,
            self._router,
            self._cache,
            model=self.name,
            settings=shown(settings),
        )
        self._response_store = build_response_store(
            settings.responses, self._cache, secret, self.metrics
        )
        self._responses = Responses(
            self.pipeline,
            self._response_store,
            max_background=settings.responses.max_background,
        )
        self._gate = build_gate(settings, self.model.admission)
        self._batch_store = build_batch_store(settings)
        self.asgi = build_app(
            self.pipeline,
            settings.http,
            self._keys,
            self._admin,
            self._tracing,
            metrics=self.metrics,
            patches=lambda: [row._asdict() for row in patches.table()],
            batches=self._batches(),
            responses=self._responses,
        )
        """The users' HTTP API; the operators' too, unless they have a port of their own."""
        self.admin_asgi = build_admin_app(
            self.pipeline, settings.http, self._keys, self._admin, metrics=self.metrics
        )
        """What is on the operators' own port; None when they have none."""
        self.in_process = InProcess(self.asgi)
        """Makes calls to `asgi` as any caller, for work of this process."""
        self._runner = None
        if self._batch_store is not None:
            self._runner = Runner(
                self._batch_store,
                settings.batches,
                self._gate,
                answer=self.in_process,
                caller_of=self._caller_of,
                max_line_bytes=max_line_bytes(settings),
                metrics=self.metrics,
            )
        # Before the engine: vLLM adds to the environment.
        self._builder = Builder(
            settings, self.name, self._cache, answer_environment(), metrics=counted
        )
        self._supervisor = Supervisor(self._builder.build, settings.supervisor, metrics=counted)
        self._lag = LoopLag()
        self.metrics.loop_lag.set_function(self._lag.worst)
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: asyncio.Future[None] | None = None

    def rpc(self) -> RpcServer:
        """The gRPC API of `settings.rpc`, its port taken, not started. Raises StartupError."""
        from packhorse.serve.rpc.server import RpcServer  # takes a moment to import

        settings = self.settings
        with_admin = settings.rpc.admin
        if with_admin is None:
            with_admin = settings.http.admin_port is None
        admin = self._admin if with_admin else None
        return RpcServer(
            self.pipeline,
            admin,
            self._keys,
            settings.rpc,
            self._tracing,
            metrics=self.metrics,
        )

    def _batches(self) -> Batches | None:
        """The files and batches, if the settings have a folder for them."""
        if self._batch_store is None:
            return None
        self.model.admission.entered = self._gate.entered
        settings = self.settings.batches
        return Batches(
            self._batch_store,
            max_window_s=settings.max_completion_window_s,
            max_file_bytes=settings.max_file_bytes,
        )

    def _caller_of(self, owner: Owner) -> Caller:
        """Who a batch runs as, with the rights of now. Raises Unauthenticated, Forbidden."""
        caller = self._keys.again(owner.name, owner.tenant)
        self._keys.check_scope(caller, "inference")
        return caller

    @property
    def has_routes(self) -> bool:
        return self._router is not None

    def reload(self) -> None:
        """Read the routes file again, soon."""
        if self._router is not None:
            self._router.reload_soon()

    @property
    def gave_up(self) -> asyncio.Event:
        """Set when no engine is built any more; the reason is in the log."""
        return self._supervisor.gave_up

    @property
    def is_stuck(self) -> bool:
        """Whether a thread that builds an engine cannot be ended."""
        return self._supervisor.is_stuck

    async def start(self) -> None:
        """Return when requests are taken. Raises StartupError. May be cancelled."""
        self._starting = asyncio.ensure_future(self._start())
        await self._starting

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self.metrics.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
        self._watch(self._lag.watch())
        await self._supervisor.start()
        for work in await self._start_adapters():
            self._watch(work)
        if self._cache is not None:
            await self._cache.start()
            self._watch(self._cache.watch())
        capacity = self._supervisor.capacity
        max_num_seqs = capacity.max_num_seqs
        if self._supervisor.pooler is not None:  # one call may have more inputs than a batch holds
            max_num_seqs = max(max_num_seqs, self.settings.service.max_inputs)
        self.model.admission.fit(max_num_seqs, capacity.kv_cache_tokens)
        self.model.attach(self._supervisor)
        if self._runner is not None:
            self._gate.limit = self.settings.batches.concurrency or max(1, capacity.max_num_seqs)
            self._watch(self._runner.run())

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _start_adapters(self) -> list[Coroutine[Any, Any, None]]:
        """The adapters, and the routes to them; returns what goes on beside requests. Raises
        StartupError.
        """
        registry, settings = self._registry, self.settings
        if registry is None:
            return []
        layers = await asyncio.to_thread(self._builder.layers)
        capacity = self._supervisor.capacity
        limits = AdapterLimits(
            max_rank=capacity.max_lora_rank,
            layers=layers,
            max_bytes=settings.adapters.max_bytes,
        )
        await registry.start(
            self._supervisor,
            limits,
            slots=capacity.max_loras,
            extra_slots=capacity.max_active_loras - capacity.max_loras,
            extra_slots_max_requests=capacity.max_num_seqs,  # all fit in it
            max_waiting=settings.adapters.max_waiting or capacity.max_num_seqs,
        )
        watching = []
        if settings.adapters.folder is not None:
            watch = FolderWatch(settings.adapters.folder, registry, metrics=self.model.metrics)
            await watch.look(wait=False)
            watching.append(watch.run())
        if self._router is not None:
            try:
                await self._router.start()
            except ServeError as error:
                raise StartupError(f"The routes cannot be built: {error.message}") from error
            watching.append(self._router.watch())
        watching.append(registry.warm())
        return watching

    def stop_admitting(self) -> None:
        """From now on every new request is refused; those in flight go on, except lines of batches,
        which another server takes up.
        """
        self.pipeline.stop_admitting()
        if self._runner is not None:
            self._runner.pause()

    async def drain(self, timeout_s: float, hurry: asyncio.Event | None = None) -> None:
        """Wait for the requests in flight, at most timeout_s or until `hurry`."""
        if self.gave_up.is_set():
            return
        logger.info("Draining for at most %.0f s", timeout_s)
        draining = asyncio.ensure_future(self.pipeline.drain(timeout_s))
        waits: list[Awaitable[object]] = [draining]
        if hurry is not None:
            waits.append(hurry.wait())
        if await first_of(*waits) is not draining or not draining.result():
            logger.warning("Aborting the requests that are still running")

    async def close(self) -> None:
        """Let the engine go, and all that belongs to it. Requests that are cut off can still be
        told so. Safe to call before `start` has ended.
        """
        starting = self._starting
        if starting is not None and not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
        if self._runner is not None:
            await self._runner.close()
        for task in self._tasks:
            task.cancel()
        await self._responses.close()
        await self._supervisor.close()
        if self._response_store is not None:
            await self._response_store.close()
        if self._cache is not None:
            await self._cache.close()
        if self._batch_store is not None:
            await self._batch_store.close()

    async def close_tracing(self) -> None:
        """Send what is left of the traces: the last step, after the last answer."""
        if self._tracing is not None:
            await self._tracing.close()

    async def stop(self, drain_s: float = 0.0) -> None:
        """All of it, for hosts whose listeners need no steps in between."""
        self.stop_admitting()
        await self.drain(drain_s)
        await self.close()
        await self.close_tracing()


def _secret(settings: CacheSettings) -> bytes:
    given = settings.secret
    return given.get_secret_value().encode() if given else secrets.token_bytes(32)


def build_gate(settings: Settings, admission: Admission) -> Gate:
    """What lets lines of batches run beside live calls, of which they leave half the room."""

    def has_room() -> bool:
        return (
            admission.running < max(1, admission.max_in_engine // 2)
            and admission.queued_tokens <= admission.max_queued_tokens // 2
        )

    return Gate(
        lambda: admission.in_flight_for_engine,
        share=settings.batches.share_beside_live,
        quiet_s=settings.batches.quiet_s,
        max_step_s=settings.batches.max_step_s,
        has_room=has_room,
    )


def build_batch_store(settings: Settings) -> BatchStore | None:
    """Files and batches, if the settings have a folder for them. Raises StartupError."""
    folder = settings.batches.folder
    return None if folder is None else BatchStore(settings.batches, folder)


def max_line_bytes(settings: Settings) -> int:
    """The most that a line of a batch may have: a body, and what is around it."""
    return settings.http.max_body_bytes + LINE_BYTES


def build_registry(settings: Settings, name: str, metrics: ModelMetrics) -> Registry | None:
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
        AdapterStore(store_folder),
        max_registered=settings.adapters.max_registered,
        max_resident=settings.engine.max_cpu_loras,
        quantum_tokens=settings.adapters.quantum_tokens,
        max_concurrent_per_adapter=settings.adapters.max_concurrent_per_adapter,
        taken=frozenset({name, AUTO}),
        allowed_roots=(folder, *roots) if folder is not None else roots,
        metrics=metrics,
    )


def build_router(
    settings: Settings, registry: Registry | None, metrics: ModelMetrics
) -> Router | None:
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
        train=TableCache(store_folder / TABLES),
        metrics=metrics,
    )


def build_response_store(
    settings: ResponsesSettings, cache: ResultCache | None, secret: bytes, metrics: ServerMetrics
) -> ResponseStore | None:
    """Where responses are kept: in the result cache's shared store, if it has one, or in memory."""
    if not settings.max_kept or not settings.max_kept_bytes:
        return None
    memory = MemoryResponses(
        max_entries=settings.max_kept,
        max_bytes=settings.max_kept_bytes,
        max_entry_bytes=settings.max_entry_bytes,
        ttl_s=settings.ttl_s,
        metrics=metrics,
    )
    shared = cache.shared_store if cache is not None else None
    if shared is None:
        return memory
    return SharedResponses(memory, *shared, secret=secret, ttl_s=settings.ttl_s)


def build_cache(
    settings: CacheSettings, secret: bytes, metrics: ModelMetrics
) -> ResultCache | None:
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
        metrics=metrics,
    )


async def first_of(*waits: Awaitable[object]) -> asyncio.Future[object]:
    """Wait until one of them is done, and return that; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return done.pop()


def default_name(settings: Settings) -> str:
    """The folder's own name, also for `.` and `../x/`; without a folder, the engine's kind."""
    return Path(settings.model).resolve().name if settings.model else settings.engine.kind
