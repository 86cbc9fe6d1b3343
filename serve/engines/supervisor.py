"""Keeps an engine alive: notices that it died or hangs, builds another, and replays the requests
that were lost. Satisfies the Engine protocol itself, so its callers need not know of it.

A request whose engine dies before it has streamed anything is replayed. The requests that were in
an engine when it died are suspects, and go to the next engine one at a time, each until it has
ended or lived longer than before (`PoisonDetector`). So the second death has a single suspect. That
request is refused as poison, and so are equal ones from then on, without another death
(`Quarantine`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from packhorse.serve.engines.base import Capacity, Engine
from packhorse.serve.engines.poison_detector import PoisonDetector, TrackedRequest
from packhorse.serve.engines.processes import end_unclaimed_children
from packhorse.serve.engines.quarantine import POISON, Quarantine
from packhorse.serve.engines.restart_policy import MAX_BACKOFF_S, RestartPolicy
from packhorse.serve.errors import (
    EngineDied,
    EngineHung,
    Invalid,
    ServeError,
    StartupError,
    Unavailable,
)
from packhorse.serve.messages import (
    AdapterVersion,
    Chunk,
    GenerateRequest,
    Pooler,
    Prompt,
    Route,
)
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.settings.supervisor import SupervisorSettings

logger = logging.getLogger("packhorse.supervisor")

CHECK_EVERY_S = 0.5
UNWIND_S = 30.0  # for a build whose processes were ended
MAX_REPLAYS = 2


class Supervisor:
    """An engine that is rebuilt when it is lost. `start` it first; `gave_up` is set when it is not
    rebuilt any more.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        settings: SupervisorSettings,
        *,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`build` is called in a worker thread; it raises StartupError."""
        self._metrics = metrics or ModelMetrics()
        self._build = build
        self._settings = settings
        self._engine: Engine | None = None
        self._generation = 0  # engines built so far
        self._building: asyncio.Future[Engine] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.max_model_len = 0
        self.capacity = Capacity(0, 0)
        self.pooler: Pooler | None = None
        self._built_in_s = 30.0
        self._down_since_s = 0.0
        self._restarts = RestartPolicy(settings)
        quarantine = Quarantine(
            poison_ttl_s=settings.poison_ttl_s, suspicion_ttl_s=settings.restart_window_s
        )
        self._detector = PoisonDetector(quarantine, self._found_poison)
        self._lost = asyncio.Event()
        self._has_changed = asyncio.Event()  # an engine came, or none will
        self._adapters: dict[int, AdapterVersion] = {}  # that an engine must have
        self._deaths: Counter[int] = Counter()  # of new engines, by the adapter that they loaded
        self._closing = False
        self.gave_up = asyncio.Event()

    async def start(self) -> None:
        """Build the first engine. Raises StartupError."""
        self._have(await self._built())
        self._watching = asyncio.create_task(self._watch())
        self._watching.add_done_callback(self._watch_ended)

    def _watch_ended(self, watching: asyncio.Task[None]) -> None:
        """Without this task a loss would go unnoticed for ever: better an end that is seen."""
        if not watching.cancelled() and (error := watching.exception()) is not None:
            logger.critical("The supervisor has failed; giving up", exc_info=error)
            self._give_up()

    def _give_up(self) -> None:
        self.gave_up.set()
        self._has_changed.set()
        self._detector.no_engine_will_be()

    @property
    def is_stuck(self) -> bool:
        """Whether an engine is being built; after `close`: whether that goes on, in a thread that
        cannot be ended.
        """
        return self._building is not None and not self._building.done()

    async def _built(self) -> Engine:
        started_s = time.monotonic()
        building = self._building = asyncio.ensure_future(asyncio.to_thread(self._build))
        limit_s = self._settings.build_timeout_s
        await asyncio.wait([building], timeout=limit_s)
        if not building.done():
            await _fail(building)
            raise StartupError(
                f"The engine was not there after {limit_s:g} s; what had been started of it was "
                "ended. If it needs longer, raise supervisor.build_timeout_s."
            )
        self._built_in_s = time.monotonic() - started_s
        return building.result()

    def _have(self, engine: Engine) -> None:
        self._building = None
        self.max_model_len, self.capacity = engine.max_model_len, engine.capacity
        self.pooler = engine.pooler
        self._engine = engine
        self._generation += 1
        self._detector.engine_is_new(self._generation)
        self._has_changed.set()
        self._metrics.engine_up.set(1)

    async def _watch(self) -> None:
        """Check the engine until it is given up."""
        while not self.gave_up.is_set():
            # At once when a request has lost its engine.
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_EVERY_S):
                    await self._lost.wait()
            self._lost.clear()
            if self._engine is None:  # closing
                return
            reason = None
            try:
                await self._engine.check()
            except EngineDied as error:
                reason = "hung" if isinstance(error, EngineHung) else "died"
                logger.error("The engine is lost: %s", error.message)
            if reason is not None:  # not inside `except`: the error would keep the engine alive
                await self._replace(reason)
            else:  # a request may have seen a hang that has ended since
                self._detector.engine_lives(self._generation)

    async def _replace(self, reason: str) -> None:
        """Build engines until one is there, or there were too many failures."""
        lost, self._engine = self._engine, None
        self._has_changed.clear()
        self._detector.engine_lost(self._generation)
        self._down_since_s = time.monotonic()
        self._metrics.engine_up.set(0)
        assert lost is not None
        await _closed(lost)
        del lost  # or it would stay while the next one is built
        while await self._may_rebuild(reason):
            try:
                self._have(await self._with_adapters(await self._built()))
            except Exception as failure:
                # Not StartupError alone: a full disk or a config that is being replaced pass too.
                known = isinstance(failure, StartupError)
                logger.error("The engine cannot be rebuilt: %s", failure, exc_info=not known)
                reason = "not_built"
                if self.is_stuck:
                    break  # another build beside it could have two engines in the end
                continue
            down_s = time.monotonic() - self._down_since_s
            logger.warning("The engine is back after %.0f s", down_s)
            return
        self._give_up()

    async def _with_adapters(self, engine: Engine) -> Engine:
        """The new engine, with the adapters of the last one loaded. An adapter that fails is left
        out, and its requests are refused. Raises StartupError when the engine dies of it, or takes
        too long.
        """
        try:
            async with asyncio.timeout(self._settings.build_timeout_s):
                for number, adapter in list(self._adapters.items()):
                    if number not in self._adapters:  # unloaded meanwhile
                        continue
                    try:
                        await engine.load_adapter(adapter)
                    except EngineDied as error:  # perhaps of something else, the first time
                        self._deaths[number] += 1
                        if self._deaths[number] > 1:
                            self._lose(adapter, error)
                        raise StartupError("The engine has ended at an adapter.") from error
                    except ServeError as error:
                        self._lose(adapter, error)
        except BaseException as error:  # nobody else has it to close
            await _closed(engine)
            if isinstance(error, TimeoutError):
                raise StartupError("The engine does not end loading its adapters.") from error
            raise
        return engine

    def _lose(self, adapter: AdapterVersion, error: ServeError) -> None:
        self._adapters.pop(adapter.int_id, None)
        logger.error("adapter=%s is lost: %s", adapter.engine_name, error.message)

    def has_adapter(self, adapter: AdapterVersion) -> bool:
        """Whether the engine has the adapter, or the next engine will have it."""
        return adapter.int_id in self._adapters

    async def load_adapter(self, adapter: AdapterVersion) -> None:
        """As the engine's own; tried once more when the engine dies meanwhile.

        Raises Unavailable when there will be no engine.
        """
        for is_last in (False, True):
            engine = await self._next_engine()
            try:
                await engine.load_adapter(adapter)
            except EngineDied:
                self._lost.set()
                if is_last:
                    raise
            else:
                self._adapters[adapter.int_id] = adapter
                return

    async def unload_adapter(self, adapter: AdapterVersion) -> None:
        """As the engine's own. If this engine has died, the next one does not load the adapter."""
        self._adapters.pop(adapter.int_id, None)
        if self._engine is not None:
            with suppress(EngineDied):
                await self._engine.unload_adapter(adapter)

    async def _next_engine(self) -> Engine:
        """An engine that lives. Raises Unavailable if there will be none."""
        while True:
            await self._has_changed.wait()
            engine = self._now()
            try:
                await engine.check()
                return engine
            except EngineDied:
                self._lost.set()
                await asyncio.sleep(CHECK_EVERY_S)  # until the loss is noticed

    async def _may_rebuild(self, reason: str) -> bool:
        """Count a failure and wait for the pause that follows from it. Returns whether to go on."""
        self._metrics.engine_failures.labels(reason).inc()
        restarts = self._restarts
        restarts.failed(None if reason == "not_built" else self._generation)
        if restarts.are_over:
            logger.critical(
                "The engine has failed %d times within %.0f s, above the limit of %d; giving up",
                restarts.count, self._settings.restart_window_s, self._settings.max_restarts,
            )  # fmt: skip
            return False
        await asyncio.sleep(restarts.pause_s)
        return True

    def _found_poison(self, tracked: TrackedRequest) -> None:
        """Engines have died of this request, which says nothing against the next engine."""
        self._metrics.poison.inc()
        logger.error("request_id=%s is poison", tracked.request_id)
        self._restarts.forgive(tracked.engines)

    def _now(self) -> Engine:
        """The engine. Raises Unavailable while there is none."""
        if self._engine is not None:
            return self._engine
        if self._closing or self.gave_up.is_set():
            raise Unavailable("The engine has stopped for good; send the request elsewhere.")
        left_s = self._built_in_s - (time.monotonic() - self._down_since_s)
        raise Unavailable(
            "The engine has failed and is being rebuilt; try again soon.",
            retry_after_s=min(max(left_s, 1.0), MAX_BACKOFF_S),
        )

    async def tokenize(self, request: GenerateRequest) -> Sequence[int]:
        return await self._now().tokenize(request)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._now().detokenize(token_ids)

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        return await self._now().token_strings(token_ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        return await self._now().tokenizer_info()

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        return await self._now().render(request, route)

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        """As the engine's own; replayed on the next engine when this one dies before the first
        chunk.

        Raises Invalid for poison, EngineDied after the first chunk.
        """
        make_fingerprint = partial(self._detector.quarantine.fingerprint, prompt, request, route)
        tracked = TrackedRequest(self._detector, request.request_id, make_fingerprint)
        self._refuse_poison(tracked, request)
        engine, generation = self._engine, self._generation
        if engine is None or self._detector.is_isolating or tracked.engines:
            engine, generation, prompt = await self._next_turn(tracked, request, route, prompt)
        try:
            for _ in range(MAX_REPLAYS + 1):
                tracked.enters(generation)
                streamed = False
                try:
                    if request.stream:
                        async with aclosing(engine.generate(prompt, request, route)) as chunks:
                            async for chunk in chunks:
                                streamed = True
                                yield chunk
                        self._answered(tracked)
                    else:  # all or nothing, so that several choices can be replayed too
                        whole = [chunk async for chunk in engine.generate(prompt, request, route)]
                        self._answered(tracked)
                        for chunk in whole:
                            yield chunk
                    return
                except EngineDied as error:
                    self._lost.set()
                    tracked.lost(generation)
                    if streamed:
                        raise EngineDied(
                            "The engine stopped while it answered; send the request again."
                        ) from error
                    if tracked.is_culprit:
                        raise self._poisonous(request) from error
                engine, generation, prompt = await self._next_turn(tracked, request, route, prompt)
                self._metrics.replays.inc()
            raise EngineDied("The engine keeps stopping; send the request again later.")
        finally:
            tracked.leave()

    def _answered(self, tracked: TrackedRequest) -> None:
        tracked.clear()
        self._restarts.answered()

    def _refuse_poison(self, tracked: TrackedRequest, request: GenerateRequest) -> None:
        """Raises Invalid for a request that was found to be poison before."""
        if tracked.is_poison:
            self._metrics.poison_refused.inc()
            raise self._poisonous(request)

    def _poisonous(self, request: GenerateRequest) -> Invalid:
        message = POISON.format(ttl_s=self._settings.poison_ttl_s)
        return Invalid(message, param=request.prompt_param)

    async def _next_turn(
        self, tracked: TrackedRequest, request: GenerateRequest, route: Route, prompt: Prompt
    ) -> tuple[Engine, int, Prompt]:
        """An engine that lives, its number, and the prompt as it renders it, at the request's turn.
        Raises Unavailable if there will be none, Invalid for poison.
        """
        self._metrics.waiting_for_engine.inc()
        try:
            while True:
                await tracked.wait_for_turn()
                self._refuse_poison(tracked, request)  # one that equals it was found meanwhile
                engine = self._now()
                try:
                    await engine.check()
                    anew = await engine.render(request, route)
                    anew = replace(anew, when_read=prompt.when_read)
                    return engine, self._generation, anew
                except EngineDied:  # in this moment, and not of this request
                    self._lost.set()
                    self._detector.engine_lost(self._generation)
                    tracked.leave()
        except BaseException:
            tracked.leave()
            raise
        finally:
            self._metrics.waiting_for_engine.dec()

    async def check(self) -> None:
        """Raises Unavailable while there is no engine. `_watch` checks the engine itself."""
        self._now()

    async def close(self) -> None:
        """End the engine, or the build of one; requests that run or wait end with an error."""
        self._closing = True
        self._detector.stop_judging()
        self._has_changed.set()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching], timeout=UNWIND_S)
        engine, self._engine = self._engine, None
        self._detector.no_engine_will_be()
        if self._building is not None:
            await _fail(self._building)
            if self.is_stuck:
                logger.critical("The building of an engine does not end; the server ends without")
        if engine is not None:
            await _closed(engine)


async def _fail(building: asyncio.Future[Engine]) -> None:
    """A build cannot be interrupted, but it fails when its processes are gone; unless its own
    thread that hangs: then it is left.
    """
    ends_s = time.monotonic() + UNWIND_S
    while not building.done() and time.monotonic() < ends_s:
        end_unclaimed_children()
        await asyncio.wait([building], timeout=0.2)
    if building.done() and building.exception() is None:
        await _closed(building.result())


async def _closed(engine: Engine) -> None:
    """Close an engine; an error must not keep the supervisor from building the next, or the server
    from ending.
    """
    try:
        await engine.close()
    except Exception:
        logger.exception("An engine could not be closed cleanly")
