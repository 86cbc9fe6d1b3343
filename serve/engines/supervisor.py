"""Keeps an engine alive: notices that it died or hangs, builds another, and gives it the work that
was lost. Satisfies the Engine protocol itself, so nothing around it knows.

A request whose engine dies before it has streamed anything is replayed. What was in an engine when
it died is suspect, and goes to the next one by itself until it has ended or lived longer than
before (`Suspects`). So the second death has a single suspect, which is refused as poison, and so is
what equals it from then on, without a death (`poison.Memory`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from packhorse.serve import metrics
from packhorse.serve.engines.base import Capacity, Engine
from packhorse.serve.engines.poison_detector import Suspect, Suspects
from packhorse.serve.engines.processes import end_children
from packhorse.serve.engines.quarantine import POISON, Memory
from packhorse.serve.engines.restart_policy import MAX_BACKOFF_S, Restarts
from packhorse.serve.errors import (
    EngineDied,
    EngineHung,
    Invalid,
    ServeError,
    StartupError,
    Unavailable,
)
from packhorse.serve.messages import AdapterVersion, Chunk, GenerateRequest, Prompt, Route
from packhorse.serve.settings.sections import SupervisorSettings

logger = logging.getLogger("packhorse.supervisor")

CHECK_EVERY_S = 0.5
UNWIND_S = 30.0  # for a build whose processes were ended
MAX_REPLAYS = 2


class Supervisor:
    """An engine that comes back. `start` it first; `gave_up` is set when it will not come back."""

    def __init__(self, build: Callable[[], Engine], settings: SupervisorSettings) -> None:
        """`build` is called in a worker thread; it raises StartupError."""
        self._build = build
        self._settings = settings
        self._engine: Engine | None = None
        self._generation = 0  # engines built so far
        self._building: asyncio.Future[Engine] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.max_model_len = 0
        self.capacity = Capacity(0, 0)
        self._built_in_s = 30.0
        self._down_since_s = 0.0
        self._restarts = Restarts(settings)
        memory = Memory(
            poison_ttl_s=settings.poison_ttl_s, suspicion_ttl_s=settings.restart_window_s
        )
        self._suspects = Suspects(memory, self._convicted)
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
        """Without it a loss would go unnoticed for ever: better an end that somebody sees."""
        if not watching.cancelled() and (error := watching.exception()) is not None:
            logger.critical("The supervisor has failed; giving up", exc_info=error)
            self._give_up()

    def _give_up(self) -> None:
        self.gave_up.set()
        self._has_changed.set()
        self._suspects.no_engine_will_be()

    @property
    def is_stuck(self) -> bool:
        """Whether an engine is being built; when closed: it goes on, in a thread that nobody can
        end.
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
        self._engine = engine
        self._generation += 1
        self._suspects.engine_is_new(self._generation)
        self._has_changed.set()
        metrics.ENGINE_UP.set(1)

    async def _watch(self) -> None:
        """Look after the engine until it is given up."""
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
                self._suspects.engine_lives(self._generation)

    async def _replace(self, reason: str) -> None:
        """Build until there is an engine, or there were too many failures."""
        lost, self._engine = self._engine, None
        self._has_changed.clear()
        self._suspects.engine_lost(self._generation)
        self._down_since_s = time.monotonic()
        metrics.ENGINE_UP.set(0)
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
        """The new engine with those that the last one had. One that fails is left out; its requests
        are refused. Raises StartupError when the engine ends, or does not get on.
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
        """Whether the engine has it, or the next one will."""
        return adapter.int_id in self._adapters

    async def load_adapter(self, adapter: AdapterVersion) -> None:
        """As the engine's own; tried again once when the engine dies of something else, or of this.

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
        """As the engine's own; no engine has it then, should this one have died."""
        self._adapters.pop(adapter.int_id, None)
        if self._engine is not None:
            with suppress(EngineDied):
                await self._engine.unload_adapter(adapter)

    async def _next_engine(self) -> Engine:
        """A living engine. Raises Unavailable if there will be none."""
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
        """Count a failure; after the pause that is due, whether to go on."""
        metrics.ENGINE_FAILURES.labels(reason).inc()
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

    def _convicted(self, suspect: Suspect) -> None:
        """Engines have died of it, which says nothing against the next one."""
        metrics.POISON.inc()
        logger.error("request_id=%s is poison", suspect.request_id)
        self._restarts.pardon(suspect.engines)

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
        """As the engine's own; begun again on the next engine when this one dies too early.

        Raises Invalid for poison, EngineDied after the first chunk.
        """
        make_fingerprint = partial(self._suspects.memory.fingerprint, prompt, request, route)
        suspect = Suspect(self._suspects, request.request_id, make_fingerprint)
        self._refuse_poison(suspect, request)
        engine, generation = self._engine, self._generation
        if engine is None or self._suspects.are_tried or suspect.engines:
            engine, generation, prompt = await self._next_turn(suspect, request, route)
        try:
            for _ in range(MAX_REPLAYS + 1):
                suspect.enters(generation)
                streamed = False
                try:
                    if request.stream:
                        async with aclosing(engine.generate(prompt, request, route)) as chunks:
                            async for chunk in chunks:
                                streamed = True
                                yield chunk
                        self._answered(suspect)
                    else:  # all or nothing, so that several choices can be replayed too
                        whole = [chunk async for chunk in engine.generate(prompt, request, route)]
                        self._answered(suspect)
                        for chunk in whole:
                            yield chunk
                    return
                except EngineDied as error:
                    self._lost.set()
                    suspect.lost(generation)
                    if streamed:
                        raise EngineDied(
                            "The engine stopped while it answered; send the request again."
                        ) from error
                    if suspect.is_guilty:
                        raise self._poisonous(request) from error
                engine, generation, prompt = await self._next_turn(suspect, request, route)
                metrics.REPLAYS.inc()
            raise EngineDied("The engine keeps stopping; send the request again later.")
        finally:
            suspect.leave()

    def _answered(self, suspect: Suspect) -> None:
        suspect.clear()
        self._restarts.answered()

    def _refuse_poison(self, suspect: Suspect, request: GenerateRequest) -> None:
        """Raises Invalid for what was found to be poison before, without another death."""
        if suspect.is_poison:
            metrics.POISON_REFUSED.inc()
            raise self._poisonous(request)

    def _poisonous(self, request: GenerateRequest) -> Invalid:
        message = POISON.format(ttl_s=self._settings.poison_ttl_s)
        return Invalid(message, param=request.prompt_param)

    async def _next_turn(
        self, suspect: Suspect, request: GenerateRequest, route: Route
    ) -> tuple[Engine, int, Prompt]:
        """A living engine, its number, and the prompt as it renders it, when it is the request's
        turn. Raises Unavailable if there will be none, Invalid for poison.
        """
        metrics.HELD.inc()
        try:
            while True:
                await suspect.turn()
                self._refuse_poison(suspect, request)  # one that equals it was found meanwhile
                engine = self._now()
                try:
                    await engine.check()
                    return engine, self._generation, await engine.render(request, route)
                except EngineDied:  # in this moment, and not of this request
                    self._lost.set()
                    self._suspects.engine_lost(self._generation)
                    suspect.leave()
        except BaseException:
            suspect.leave()
            raise
        finally:
            metrics.HELD.dec()

    async def check(self) -> None:
        """Raises Unavailable while there is no engine; `_watch` judges the one there is."""
        self._now()

    async def close(self) -> None:
        """End the engine, or the building of one: what still runs or waits ends with an error."""
        self._closing = True
        self._suspects.accuse_nobody()
        self._has_changed.set()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching], timeout=UNWIND_S)
        engine, self._engine = self._engine, None
        self._suspects.no_engine_will_be()
        if self._building is not None:
            await _fail(self._building)
            if self.is_stuck:
                logger.critical("The building of an engine does not end; the server ends without")
        if engine is not None:
            await _closed(engine)


async def _fail(building: asyncio.Future[Engine]) -> None:
    """A build cannot be interrupted, but it fails when its processes are gone; unless it is its own
    thread that hangs: then it is left.
    """
    ends_s = time.monotonic() + UNWIND_S
    while not building.done() and time.monotonic() < ends_s:
        end_children()
        await asyncio.wait([building], timeout=0.2)
    if building.done() and building.exception() is None:
        await _closed(building.result())


async def _closed(engine: Engine) -> None:
    """Close it; what goes wrong must not keep us from building the next or from ending."""
    try:
        await engine.close()
    except Exception:
        logger.exception("An engine could not be closed cleanly")
