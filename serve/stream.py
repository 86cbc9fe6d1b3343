"""One request on its way through the engine: its chunks, its deadline, its counts and log line.

`Service` makes a Stream of every request; whoever gets one iterates it to its end, or closes it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from packhorse.serve import metrics
from packhorse.serve.adapters.base import Lease
from packhorse.serve.cache.single_flight import Flight
from packhorse.serve.engines.base import Engine
from packhorse.serve.errors import Cancelled, ErrorKind, Internal, ServeError
from packhorse.serve.ignored import counted, told
from packhorse.serve.limits.deadline import Deadline
from packhorse.serve.messages import CacheMark, Chunk, GenerateRequest, Prompt, Route, Usage
from packhorse.serve.sources import Source
from packhorse.serve.telemetry.logs import RequestLog
from packhorse.serve.telemetry.request_timings import Timeline

logger = logging.getLogger("packhorse.request")

Step = TypeVar("Step")


class Stream:
    """A request that has its first chunk. Iterate it to its end, then read `usage`; or `close()` it
    to abort.
    """

    def __init__(
        self,
        engine: Engine,
        request: GenerateRequest,
        route: Route,
        *,
        lease: Lease | None,
        timeline: Timeline,
        timeout_s: float,
        log: RequestLog,
        on_end: Callable[[], None],
        again: Callable[[Stream, ServeError], Awaitable[bool]],
    ) -> None:
        """It has the `lease` until its end. `on_end` is called once, however it ends; `again` when
        its source has failed before it gave anything: whether it has another one now.
        """
        self.request = request
        self.route = route
        self.lease = lease
        self.prompt = Prompt((), 0)
        self.source: Source | None = None
        """Where the chunks come from; set before `open`."""
        self.leading: Flight | None = None
        """What others wait for and this stream has not launched yet."""
        self.mark: CacheMark = "bypass"
        self.tries = 0
        self.timeline = timeline
        self._deadline = Deadline(timeout_s)
        self._log = log
        self._on_end = on_end
        self._again = again
        self._engine = engine
        self._chunks: AsyncGenerator[Chunk, None] | None = None
        self._first: Chunk | None = None
        self._opening: asyncio.Task[None] | None = None
        self._unfinished = request.sampling.n
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._reasoning_tokens = 0
        self._outcome: str | None = None

    async def render(self) -> None:
        """Make the prompt. Raises ServeError."""
        self.timeline.render_s = time.monotonic()
        self.prompt = await self.guarded(lambda: self._engine.render(self.request, self.route))
        self.timeline.rendered_s = time.monotonic()

    async def open(self) -> None:
        """Wait for the first chunk. Raises ServeError."""
        await self.guarded(self._begin)
        timeline = self.timeline
        timeline.first_s = time.monotonic()
        if self.request.stream:  # otherwise the first chunk is also the last
            metrics.FIRST_TOKEN_SECONDS.observe(timeline.first_s - timeline.arrived_s)

    async def _begin(self) -> None:
        while True:
            source = self.source
            assert source is not None
            try:
                await source.ready()
                self._chunks = source.chunks()
                self._first = await anext(self._chunks)
            except ServeError as error:
                source.ended(0, error.kind)
                if await self._again(self, error):
                    continue
                raise
            source.begun()
            return

    def open_meanwhile(self) -> asyncio.Task[None]:
        """Open in a task of its own, which the first step of an iteration waits for."""
        self._opening = asyncio.create_task(self.open())
        return self._opening

    async def guarded(self, step: Callable[[], Awaitable[Step]]) -> Step:
        """Take a step of the start; if it fails, this request has ended."""
        deadline = self._deadline
        is_within = deadline.waiting  # another step, which goes on
        try:
            deadline.watch()
            deadline.waiting = True
            done = await step()
            deadline.check()
        except BaseException as error:
            deadline.waiting = False
            if self._chunks is not None:
                await self._chunks.aclose()
            self._end_with(error)
            raise
        deadline.waiting = is_within
        return done

    def _end_with(self, error: BaseException) -> None:
        """Count the request as ended by this error. Raises what the caller is to see in its stead,
        if anything.
        """
        if self._deadline.interrupted():
            self.end(ErrorKind.DEADLINE)
            raise self._deadline.error() from None
        if isinstance(error, ServeError):
            self.end(error.kind)
        elif isinstance(error, Exception):
            logger.exception("request_id=%s failed unexpectedly", self.request.request_id)
            self.end(ErrorKind.INTERNAL)
            raise Internal(
                "The server failed on this request; the request id leads to its log."
            ) from error
        else:
            self.end(ErrorKind.CANCELLED)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields of the request without effect: unknown ones, and those of no use to this model."""
        names = (*self.request.ignored, *self.prompt.ignored)
        return told(names) if names else ()

    @property
    def usage(self) -> Usage:
        """Tokens so far; complete after the last chunk."""
        return Usage(
            len(self.prompt.token_ids),
            self._completion_tokens,
            self._cached_tokens,
            self._reasoning_tokens,
        )

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        """The chunks. Raises ServeError when the engine fails on the way; closes in every case."""
        if self._opening is not None:
            await self._opening
        assert self._chunks is not None
        assert self._first is not None
        deadline = self._deadline
        try:
            deadline.watch()
            self._count(self._first)
            yield self._first
            deadline.check()
            deadline.waiting = True
            async for chunk in self._chunks:
                deadline.waiting = False
                self._count(chunk)
                yield chunk
                if deadline.passed:
                    deadline.check()
                deadline.waiting = True
            if self._unfinished:
                deadline.check()
                raise RuntimeError("the engine ended a stream without a reason")
            self.end("ok")
        except BaseException as error:
            self._end_with(error)
            raise
        finally:
            deadline.waiting = False
            await self._chunks.aclose()

    def _count(self, chunk: Chunk) -> None:
        self._completion_tokens += len(chunk.token_ids)
        if chunk.cached_tokens:
            self._cached_tokens = chunk.cached_tokens
        if chunk.finish_reason is not None:
            self._unfinished -= 1
            self._reasoning_tokens += chunk.reasoning_tokens
            self.timeline.engine = chunk.times

    async def close(self) -> None:
        """Abort what is still running. Safe to call twice, and after the end."""
        opening = self._opening
        if opening is not None and opening is not asyncio.current_task():
            opening.cancel()
            await asyncio.wait([opening])
            if not opening.cancelled():
                opening.exception()  # looked at, so that asyncio does not complain
        if self._chunks is not None:
            await self._chunks.aclose()
        self.end(ErrorKind.CANCELLED)

    async def abandon(self, error: BaseException) -> None:
        """Abort it, because its call has failed with this."""
        if isinstance(error, Exception) and not isinstance(error, ServeError):
            self.end(ErrorKind.INTERNAL)
        await self.close()

    def end(self, outcome: str) -> None:
        """Count and log the request, once."""
        if self._outcome is not None:
            return
        self._outcome = str(outcome)
        self._deadline.stop()
        metrics.REQUESTS.labels(self._outcome).inc()
        metrics.REQUEST_SECONDS.observe(time.monotonic() - self.timeline.arrived_s)
        usage = self.usage
        if self.leading is not None:
            self.leading.fail(Cancelled("The request that this one waited for has ended."))
        if self.source is not None:
            self.source.ended(usage.completion_tokens, self._outcome)
        if self.lease is not None:
            self.lease.release()
        self._on_end()
        request, route = self.request, self.route
        self.timeline.tell(request, route, self.mark, usage, self._outcome)
        self._log.ended(
            request,
            self._outcome,
            model=route.model,
            adapter=route.adapter.engine_name if route.adapter else None,
            route=route.stage,
            cache=self.mark,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            **({"ignored": counted(ignored)} if (ignored := self.ignored) else {}),
            **self.timeline.fields(),
        )


async def merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of several streams as they come, each with its stream's number.

    Raises the ServeError of the first stream that fails; ends all of them in every case.
    """
    if len(streams) == 1:
        async with aclosing(aiter(streams[0])) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    ready: asyncio.Queue[tuple[int, Chunk | BaseException | None]] = asyncio.Queue(maxsize=1)

    async def pump(number: int, stream: Stream) -> None:
        try:
            async with aclosing(aiter(stream)) as chunks:
                async for chunk in chunks:
                    await ready.put((number, chunk))
            await ready.put((number, None))
        except ServeError as error:
            await ready.put((number, error))

    pumps = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(streams)]
    running = len(pumps)
    try:
        while running:
            number, item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield number, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
