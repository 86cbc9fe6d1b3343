"""Whether an engine gets on, judged by what it does and not by what it says.

A step of the engine may take long: a long prompt on a slow machine. So it counts as hung when
requests wait, no step ends, and the processes that compute use no CPU either. A process that
computes on and never ends a step (a kernel that spins) is found by a second, much longer limit.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

import psutil
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from packhorse.serve.engines.processes import Activity, claim, end, release, shared_memory
from packhorse.serve.errors import EngineHung
from packhorse.serve.settings.engine import EngineSettings

WORKER = "VLLM::Worker"  # as vLLM calls the process
BUSY_SHARE = 0.05  # of one CPU: less is what a process that waits uses
DEATH_LOOKS, DEATH_LOOK_S = 20, 0.1  # 2 s; it took 0.4
LONGEST_LOOK_S = 1.0  # more means that the whole machine stood still, or this process


async def has_died(llm: AsyncLLM) -> bool:
    """Whether the engine is at its end, asked when a call of it has failed: a worker's death fails
    the calls that wait for it first, and only then is the engine known to be dead.
    """
    for _ in range(DEATH_LOOKS):
        if llm.errored:
            return True
        await asyncio.sleep(DEATH_LOOK_S)
    return bool(llm.errored)


class Heartbeat:
    """Counts the steps of one engine."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1

    def stat_logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        """For AsyncLLM, which makes one for each engine core."""
        return _StepCounter(self)


class _StepCounter(StatLoggerBase):
    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat

    def record(self, *_: Any, **__: Any) -> None:
        self._heartbeat.step()

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class Watch(Protocol):
    """What `patches.engine_watch` sees of an engine."""

    cores: list[psutil.Process]
    """The processes of its engine cores."""

    def has_work(self) -> bool: ...


class Health:
    """Of one engine. Call `look` every second or so."""

    def __init__(self, watch: Watch, heartbeat: Heartbeat, settings: EngineSettings) -> None:
        self._settings = settings
        self._watch = watch
        self._heartbeat = heartbeat
        cores = watch.cores
        below = [child for core in cores for child in core.children(recursive=True)]
        self._processes = [*cores, *below]
        claim(self._processes)
        self._shared = shared_memory(self._processes)
        # The core only hands out work, and is busy even while it waits; where there is but one
        # worker, it may be the core itself.
        workers = [child for child in below if WORKER in " ".join(child.cmdline())]
        self._activity = Activity(workers or cores)
        self._looked_s = time.monotonic()
        self._steps = 0
        self._step_s = self._idle_s = 0.0  # with work to do: since a step ended, since CPU was used

    def look(self) -> None:
        """Raises EngineHung."""
        now_s = time.monotonic()
        since_s, self._looked_s = now_s - self._looked_s, now_s
        has_stepped = self._steps != self._heartbeat.steps
        is_waited_for = not has_stepped and self._watch.has_work()
        used_s = self._activity.since_last_look(with_helpers=is_waited_for)
        is_busy = used_s > BUSY_SHARE * since_s
        counted_s = min(since_s, LONGEST_LOOK_S)
        if has_stepped:
            self._steps = self._heartbeat.steps
            self._step_s = self._idle_s = 0.0
        # Without work both clocks stand still: clients that leave must not hide a hang.
        elif is_waited_for:
            self._step_s += counted_s
            self._idle_s = 0.0 if is_busy else self._idle_s + counted_s
        step_s, idle_s = self._step_s, self._idle_s
        if idle_s > self._settings.stall_timeout_s:
            raise EngineHung(
                f"Requests wait, and the engine has done nothing for {idle_s:.0f} s, above the "
                f"limit of {self._settings.stall_timeout_s:.0f} s."
            )
        if step_s > self._settings.step_timeout_s:
            raise EngineHung(
                f"The engine has been at one step for {step_s:.0f} s, above the limit of "
                f"{self._settings.step_timeout_s:.0f} s."
            )

    def end_processes(self) -> None:
        """End the engine's processes at once, whatever they do, and free the memory that they
        share, which they cannot do then.
        """
        end(self._processes)
        release(self._processes)
        for path in self._shared:
            path.unlink(missing_ok=True)
