"""Runs the batches of all tenants: tenants take turns by the line, the batches of one follow each
other. Which lines are in the engine, and when, is the gate's to say.

A line is a call of its batch's owner through the server's own endpoints (`Answer`), with the rights
that the owner's key has at that moment. What is refused for the moment (quota, overload, an engine
that is being built) is waited out. What a kill interrupts runs again; what was answered does not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from packhorse.serve.batches.gate import Gate, as_batch
from packhorse.serve.batches.records import (
    Answer,
    BatchRecord,
    CallerOf,
    LineFault,
    Owner,
    Status,
)
from packhorse.serve.batches.run import BatchRun, InputFaulty, open_run
from packhorse.serve.batches.store import BatchStore
from packhorse.serve.errors import ServeError
from packhorse.serve.messages import Caller
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.settings.batches import BatchSettings

logger = logging.getLogger("packhorse.batches")

POLL_S = 0.05
"""How often the gate is asked again while lines wait for it."""
LINES_AT_ONCE = 8
IDLE_S = 30.0
"""How often expiry and ages are looked at."""
AFTER_FAILURE_S = 10.0
"""How long a batch rests when the disk has refused something of it."""
REST = {
    "expired": (
        "batch_expired",
        "This request could not be run before the completion window expired.",
    ),
    "cancelled": ("batch_cancelled", "This request was cancelled before it ran."),
    "failed": ("batch_failed", "This request was not run, because its batch failed."),
}
"""What the error file says of lines that did not run, by how their batch ends."""


class Pace:
    """How fast the calls of one owner may come: halved when they are refused, and slowly raised."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s = 0.0
        self._most = 1.0
        self.in_flight = 0

    def allows(self, caller: Caller) -> bool:
        """Whether the owner may have one more call in flight. One of those that its key may have at
        once is left to others.
        """
        most = self._most
        if caller.max_concurrent is not None:
            most = min(most, max(1, caller.max_concurrent - 1))
        return self._clock() >= self._until_s and self.in_flight < most

    def ended(self, wait_s: float | None) -> None:
        """A call has ended, or was refused for so long."""
        if wait_s is None:
            self._most = min(self._most + 1, 1024)
        else:
            self._most = max(1.0, self._most / 2)
            self._until_s = max(self._until_s, self._clock() + wait_s)


class _Active:
    """A batch whose lines run."""

    def __init__(self, record: BatchRecord, run: BatchRun, pace: Pace) -> None:
        self.record = record
        self.run = run
        self.pace = pace
        self.lines: set[asyncio.Task[None]] = set()
        self.ends_as: Status | None = None
        """How it is to end, whatever lines are left."""


class Runner:
    """See above. Everything happens in the event loop; one task, and one for each line."""

    def __init__(
        self,
        store: BatchStore,
        settings: BatchSettings,
        gate: Gate,
        *,
        answer: Answer,
        caller_of: CallerOf,
        max_line_bytes: int,
        metrics: ServerMetrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """A line may have max_line_bytes; `clock` gives Unix time in seconds."""
        self._store = store
        self._settings = settings
        self._gate = gate
        self._answer = answer
        self._caller_of = caller_of
        self._max_line_bytes = max_line_bytes
        self._clock = clock
        self._lines = (metrics or ServerMetrics()).batch_lines
        if metrics is not None:
            metrics.batches_unfinished.set_function(lambda: len(store.unfinished()))
        self._turns: deque[_Active] = deque()
        self._held: set[str] = set()
        """Ids of the batches that are being opened, run or ended."""
        self._paces: dict[Owner, Pace] = {}
        self._rests_until_s: dict[str, float] = {}
        self._wake = store.changed
        self._closing: set[asyncio.Task[None]] = set()
        self._opening: asyncio.Task[None] | None = None
        self._swept_s = 0.0
        self._is_stopped = False

    async def run(self) -> None:
        """Run batches until cancelled."""
        while not self._is_stopped:
            self._wake.clear()
            try:
                self._look()
                await self._start_lines()
            except Exception:  # the edge: batches go on, and nobody else would tell
                logger.exception("Batches: unexpected")
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if self._turns else IDLE_S):
                    await self._wake.wait()

    async def _start_lines(self) -> None:
        started = 0
        while self._gate.allows() and self._start_line():
            started += 1
            if started % LINES_AT_ONCE == 0:  # others have the event loop, too
                await asyncio.sleep(0)

    def _look(self) -> None:
        """Begin what is due beside lines: opening, ending, deleting."""
        now_s = self._clock()
        for each in list(self._turns):
            if each.record.status == "cancelling":
                self._end(each, "cancelled")
            elif each.record.expires_at <= now_s:
                self._end(each, "expired")
            elif not self._store.has_room(each.record.owner.tenant):
                self._fail(each, "storage_limit_exceeded", "The tenant's files are above the "
                           "limit of bytes; delete some, and send the rest again.")  # fmt: skip
            elif each.run.is_done:
                self._end(each, "completed")
        if self._opening is None or self._opening.done():
            batch, is_queued = self._next(now_s)
            if batch is not None:
                self._held.add(batch.id)
                self._opening = self._beside(self._open(batch, is_queued=is_queued))
        if now_s - self._swept_s >= IDLE_S:
            self._swept_s = now_s
            self._beside(self._sweep())

    def _next(self, now_s: float) -> tuple[BatchRecord | None, bool]:
        """The next batch to open; and whether it is only looked at, because another of its tenant
        runs.
        """
        unfinished = self._store.unfinished()
        busy = {batch.owner.tenant for batch in unfinished if batch.id in self._held}
        for batch in unfinished:
            rests = self._rests_until_s.get(batch.id, 0.0) > time.monotonic()
            if batch.id in self._held or rests:
                continue
            if batch.owner.tenant not in busy:
                return batch, False
            if batch.status == "validating":
                return batch, True
            if batch.status == "cancelling" or batch.expires_at <= now_s:
                return batch, False
        return None, False

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closed)
        return task

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("Batches: unexpected", exc_info=error)

    async def _sweep(self) -> None:
        try:
            await self._store.sweep()
        except OSError as error:
            logger.warning("Old files cannot be deleted: %s", error.strerror)

    async def _open(self, batch: BatchRecord, *, is_queued: bool) -> None:
        """Take up a batch: a new one, one that waited for another of its tenant, or one that a
        server before this one began.
        """
        run = None
        try:
            run = await self._opened(batch)
        except InputFaulty as error:
            batch.faults = error.faults
            await self._finalize(batch, "failed")
        except FileNotFoundError:
            batch.faults = [LineFault("input_file_gone", "The input file is not there any more.")]
            await self._finalize(batch, "failed")
        except OSError as error:
            self._rest(batch, error)
        except Exception:  # the edge: the batch must not be held for ever
            logger.exception("%s could not be taken up", batch.id)
            self._rest(batch, OSError("unexpected"))
        if run is None:
            self._held.discard(batch.id)
        elif is_queued:
            await run.close()
            self._held.discard(batch.id)
        else:
            tenant = batch.owner.tenant
            run.took = self._gate.took
            run.wrote = lambda size: self._store.add_bytes(tenant, size)
            pace = self._paces.setdefault(batch.owner, Pace(time.monotonic))
            self._turns.append(_Active(batch, run, pace))

    async def _opened(self, batch: BatchRecord) -> BatchRun | None:
        """None: it was being finalized, and is now. Raises InputFaulty, OSError."""
        if batch.outcome is not None:
            await self._store.finalize(batch, batch.outcome)
            return None
        run = await asyncio.to_thread(
            open_run,
            self._store.paths(batch),
            batch.endpoint,
            max_lines=self._settings.max_lines,
            max_line_bytes=self._max_line_bytes,
        )
        batch.progress, batch.usage = run.progress, run.usage
        if batch.status == "validating":
            batch.status = "in_progress"
            batch.in_progress_at = int(self._clock())
            try:
                await self._store.save(batch)
            except OSError:
                await run.close()
                raise
        return run

    def _rest(self, batch: BatchRecord, error: OSError) -> None:
        now_s = time.monotonic()
        self._rests_until_s = {
            name: until_s for name, until_s in self._rests_until_s.items() if until_s > now_s
        }
        self._rests_until_s[batch.id] = now_s + AFTER_FAILURE_S
        logger.warning("%s rests, as the disk refuses: %s", batch.id, error.strerror or error)

    def _start_line(self) -> bool:
        """Start one line of the batch whose turn it is. False: no batch has one that may run."""
        for _ in range(len(self._turns)):
            if not self._turns:
                break
            each = self._turns[0]
            self._turns.rotate(-1)
            if each.ends_as is not None or each.run.blocked_until_s > time.monotonic():
                continue
            try:
                caller = self._caller_of(each.record.owner)
            except ServeError as error:
                self._fail(each, error.openai_code or str(error.kind), error.message)
                continue
            if not each.pace.allows(caller):
                continue
            position = each.run.take()
            if position is None:
                continue
            task = asyncio.create_task(self._line(each, position, caller))
            each.lines.add(task)
            each.pace.in_flight += 1
            self._gate.start(task)
            task.add_done_callback(partial(self._line_ended, each, position))
            return True
        return False

    async def _line(self, each: _Active, position: int, caller: Caller) -> None:
        as_batch()
        try:
            wait_s = await each.run.attempt(position, caller, self._answer)
        except OSError as error:
            self._fail(each, "input_file_gone", str(error))
            return
        each.pace.ended(wait_s)
        if wait_s is not None:
            self._lines.labels("postponed").inc()
        else:
            is_error = each.run.has_failed(position)
            self._lines.labels("failed" if is_error else "answered").inc()

    def _line_ended(self, each: _Active, position: int, task: asyncio.Task[None]) -> None:
        each.lines.discard(task)
        each.pace.in_flight -= 1
        each.run.give_back(position)  # cancelled before it began, it could not do so itself
        if task.cancelled() and each.ends_as is None and not self._is_stopped:
            self._lines.labels("preempted").inc()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: a line failed unexpectedly", each.record.id, exc_info=error)
            self._fail(each, "server_error", "The server failed; its log says how.")
        self._wake.set()

    def _fail(self, each: _Active, code: str, message: str) -> None:
        if each.ends_as is None:
            each.record.faults = [LineFault(code, message)]
            self._end(each, "failed")

    def _end(self, each: _Active, outcome: Status) -> None:
        """End a batch, as soon as its lines in flight are ended."""
        if each.ends_as is not None:
            return
        each.ends_as = outcome
        for task in each.lines:
            task.cancel()
        self._turns.remove(each)
        self._beside(self._close(each, outcome))

    async def _close(self, each: _Active, outcome: Status) -> None:
        record, run = each.record, each.run
        while each.lines:
            await asyncio.wait(each.lines)
            await asyncio.sleep(0)
        try:
            written = await run.flush()
            if written and outcome in REST:
                written = await run.give_up_rest(*REST[outcome])
        except OSError as error:
            self._rest(record, error)
            written = False
        except Exception:  # the edge: the batch must not be held for ever
            logger.exception("%s could not be ended", record.id)
            written = False
        await run.close()
        if not written:  # it is opened again, and what could not be written runs again
            self._rests_until_s[record.id] = time.monotonic() + AFTER_FAILURE_S
            self._held.discard(record.id)
            return
        if self._paces.get(record.owner) is each.pace and not each.pace.in_flight:
            self._paces.pop(record.owner, None)
        await self._finalize(record, outcome)
        self._held.discard(record.id)

    async def _finalize(self, record: BatchRecord, outcome: Status) -> None:
        try:
            await self._store.finalize(record, outcome)
        except OSError as error:
            self._rest(record, error)
            return
        except Exception:
            logger.exception("%s could not be ended", record.id)
            self._rest(record, OSError("unexpected"))
            return
        logger.info(
            "%s of %s has ended: %s, %d lines, %d answered, %d failed",
            record.id,
            record.owner.name,
            record.status,
            record.progress.total,
            record.progress.completed,
            record.progress.failed,
        )

    def pause(self) -> None:
        """End the lines in flight, and start none: the server stops, and another will go on."""
        self._is_stopped = True
        self._wake.set()
        self._gate.stop()

    async def close(self) -> None:
        """Keep what was answered. Safe to call twice."""
        self.pause()
        while waits := {*self._closing, *(task for each in self._turns for task in each.lines)}:
            await asyncio.wait(waits)
        for each in self._turns:
            await each.run.close()
        self._turns.clear()
