"""Responses that are generated after their call was answered: a bounded number, each by a task.

A job waits until the server has a place for it, as a call that comes again and again would: it is
`queued` then. From there on it counts as any call in flight, and its request as any other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from packhorse.serve.api.errors import unexpected
from packhorse.serve.api.responses.answer import Answer
from packhorse.serve.errors import (
    DeadlineExceeded,
    Overloaded,
    ServeError,
    Unavailable,
)
from packhorse.serve.messages import Caller
from packhorse.serve.pipeline import Pipeline

logger = logging.getLogger("packhorse.responses")

TENANT_SHARE = 0.5
RETRY_S = 30.0


@dataclass(slots=True)
class Job:
    """One response in the background."""

    response_id: str
    caller: Caller
    timeout_s: float
    """For waiting and generating together."""
    ends_by_s: float = field(init=False)
    """Unix time."""
    task: asyncio.Task[None] | None = None
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.ends_by_s = time.time() + self.timeout_s


class Background:
    """The jobs of one server."""

    def __init__(self, pipeline: Pipeline, *, max_jobs: int) -> None:
        self._pipeline = pipeline
        self._max_jobs = max_jobs
        self._max_of_tenant = max(1, int(max_jobs * TENANT_SHARE))
        self._jobs: dict[str, Job] = {}

    @property
    def count(self) -> int:
        return len(self._jobs)

    def has(self, response_id: str) -> bool:
        return response_id in self._jobs

    def submit(
        self,
        job: Job,
        answer: Answer,
        work: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        """Begin a job; `work` generates the answer, `changed` keeps it. Raises Overloaded."""
        tenant = job.caller.tenant
        of_tenant = sum(other.caller.tenant == tenant for other in self._jobs.values())
        if len(self._jobs) >= self._max_jobs or of_tenant >= self._max_of_tenant:
            raise Overloaded(
                f"{len(self._jobs)} responses wait or run in the background, {of_tenant} of this "
                f"tenant; the limits are {self._max_jobs} and {self._max_of_tenant}. Try again "
                "when one has ended.",
                retry_after_s=5,
            )
        changed()
        self._jobs[job.response_id] = job
        job.task = asyncio.create_task(self._run(job, answer, work, changed))

    async def cancel(self, caller: Caller, response_id: str) -> bool:
        """End a job, and wait until it has ended. False when no such job runs here."""
        job = self._jobs.get(response_id)
        if job is None or job.caller.tenant != caller.tenant or job.task is None:
            return False
        if not job.is_cancelled:  # a second time, it could interrupt its own end
            job.is_cancelled = True
            job.task.cancel()
        await asyncio.wait([job.task])
        return True

    async def close(self) -> None:
        """End all of them: they have failed."""
        await asyncio.sleep(0)  # a task that has not begun would not clean up
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(
        self,
        job: Job,
        answer: Answer,
        work: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        try:
            await self._with_a_place(job, answer, work, changed)
        except asyncio.CancelledError:
            if job.is_cancelled:
                answer.cancel()
            else:
                answer.fail(Unavailable("The server was stopped before this response ended."))
        except ServeError as error:
            answer.fail(error)
        except Exception:  # the edge: nobody else hears of it
            logger.exception("response_id=%s failed unexpectedly", job.response_id)
            answer.fail(unexpected())
        finally:
            del self._jobs[job.response_id]
            changed()

    async def _with_a_place(
        self,
        job: Job,
        answer: Answer,
        work: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        """Raises ServeError."""
        while True:
            try:
                permit = self._pipeline.enter(job.caller)
            except Overloaded as error:
                await self._wait(job, error)
                continue
            try:
                if answer.status == "queued":
                    answer.status = "in_progress"
                    changed()
                await work()
                return
            except Overloaded as error:
                overload = error
            finally:
                permit.leave()
            answer.status = "queued"
            await self._wait(job, overload)

    async def _wait(self, job: Job, error: Overloaded) -> None:
        """Raises DeadlineExceeded when no time is left to try again."""
        pause_s = min(error.retry_after_s, RETRY_S)
        if time.time() + pause_s >= job.ends_by_s:
            raise DeadlineExceeded(
                f"The response found no place within its {job.timeout_s:g} s: {error.message}"
            )
        await asyncio.sleep(pause_s)
