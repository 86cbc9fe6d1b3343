"""One request, from top to bottom: resolve its model and adapter, render its prompt, look into the
result cache, pass admission, wait for its turn on the adapter, read the engine.

The API layer calls `Pipeline.start_all` with the requests of one call and iterates the Streams that
it returns. All that can still be refused is refused there, because a streaming response sends its
status before its first item.
What a request holds (its place among those in flight, its deadline, the version of its adapter, its
look-up, its permit for the engine) is on one exit stack, and is given back in reverse order however
the request ends.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import TypeVar

from packhorse.serve.accounting import Accounting
from packhorse.serve.adapters.base import Lease
from packhorse.serve.cache.base import Lookup
from packhorse.serve.engines.base import Engine, check_kind
from packhorse.serve.errors import ErrorKind, Invalid, ServeError, Unavailable
from packhorse.serve.limits.admission import Admission, Cost, EnginePermit, InFlightPermit
from packhorse.serve.limits.deadline import Deadline
from packhorse.serve.messages import ANONYMOUS, Caller, Chunk, GenerateRequest, Prompt, Route
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.models import Model, Models
from packhorse.serve.request_context import RequestContext
from packhorse.serve.telemetry.request_timings import RequestTimings
from packhorse.serve.tenancy import Tenancy

# Errors that are not the caller's doing.
SERVERS_FAULT = {ErrorKind.UNAVAILABLE, ErrorKind.INTERNAL, ErrorKind.OVERLOADED}

# Of one call, so many requests take a step before others have the event loop again.
YIELD_EVERY = 32

Step = TypeVar("Step")


class Pipeline:
    """What all requests of a server pass, whichever model they ask for."""

    def __init__(
        self,
        models: Models,
        *,
        tenancy: Tenancy | None = None,
        accounting: Accounting | None = None,
        request_timeout_s: float = 600.0,
        max_request_timeout_s: float = 3600.0,
        max_inputs: int = 2048,
    ) -> None:
        """A request takes at most request_timeout_s, or what it asks for up to the maximum. A call
        on a pooling model has at most max_inputs. `tenancy` None: one with a secret of its own.
        """
        self.models = models
        self._tenancy = tenancy or Tenancy(secrets.token_bytes(32))
        self._accounting = accounting or Accounting()
        self._request_timeout_s = request_timeout_s
        self.max_request_timeout_s = max_request_timeout_s
        self.max_inputs = max_inputs
        self.created_s = int(time.time())
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def admission(self) -> Admission:
        """The limits on calls at once, for the whole server: they hold before a body is read, so
        before the model is known. They are kept by the first model.
        """
        return self.models.first.admission

    def enter(self, caller: Caller, *, uses_engine: bool = True) -> InFlightPermit:
        """Count a call in, before its body is read: middleware and gRPC do so for every endpoint.
        Release the permit when the call has ended. `uses_engine`: batches make room for it.

        Raises Unavailable while draining, Overloaded above the limits on calls at once.
        """
        self._check_open()
        return self.admission.enter(caller, uses_engine=uses_engine)

    async def start(self, request: GenerateRequest) -> Stream:
        """Do everything that can still be refused; return once the first chunk is in hand.

        Raises ServeError.
        """
        (stream,) = await self.start_all([request])
        return stream

    async def start_all(self, requests: Sequence[GenerateRequest]) -> list[Stream]:
        """Start the requests of one call; return once the first of them has its first chunk.

        All are rendered before any is generated, so that a bad one costs nothing; when one is
        refused, or the caller leaves, all others are ended too. Raises ServeError.
        """
        streams: list[Stream] = []
        try:
            for number, request in enumerate(requests, 1):
                if number % YIELD_EVERY == 0:
                    await asyncio.sleep(0)
                stream = self._stream(request)
                streams.append(stream)
                await stream.step(partial(self._look_up, stream))
            self._admit(streams)
            if len(streams) == 1:
                await streams[0].step(streams[0].open)
            else:
                openings = []
                for number, stream in enumerate(streams, 1):
                    openings.append(stream.open_meanwhile())
                    if number % YIELD_EVERY == 0:
                        await asyncio.sleep(0)
                done, _ = await asyncio.wait(openings, return_when=asyncio.FIRST_COMPLETED)
                for opening in done:
                    opening.result()
        except BaseException as error:
            for stream in streams:  # the one that has failed is over already
                await stream.abandon(error)
            raise
        return streams

    def _stream(self, request: GenerateRequest) -> Stream:
        """A new stream, counted as in flight until its end. Raises ServeError."""
        timings = RequestTimings()
        metrics = self.models.first.metrics
        try:
            self._check_open()
            self.models.check_loaded()
            timeout_s = self.timeout_s(request)
            resolved = self.models.resolve(request)
            model, lease = resolved.model, resolved.lease
            metrics = model.metrics
            try:
                engine = model.engine
                check_kind(engine, request)
            except ServeError:
                if lease is not None:
                    lease.release()
                raise
        except ServeError as error:
            self._accounting.refused(metrics, request.request_id, error, request.caller)
            raise
        adapter = lease.adapter if lease else None
        salt = self._tenancy.prefix_cache_salt(request.caller.tenant, request.cache_salt)
        route = Route(model.name, adapter, resolved.stage, salt)
        metrics.routes.labels(adapter.name if adapter else "", resolved.stage).inc()
        timings.routed_s = time.monotonic()
        stream = Stream(RequestContext(request, route, lease, timings), model, engine, timeout_s)
        stack = stream.stack
        self._in_flight += 1
        self._idle.clear()
        metrics.in_flight.inc()
        stack.callback(self._left, metrics)
        stack.push(self._accounting.of(stream.context, metrics))
        stack.push(stream.deadline)
        if lease is not None:
            stack.callback(lease.release)
        return stream

    async def _look_up(self, stream: Stream) -> None:
        """Find where the answer comes from; render the prompt where that takes one. Raises
        ServeError.
        """
        context = stream.context
        is_admitted = False

        async def render(*, for_engine: bool) -> Prompt:
            if for_engine and not is_admitted:
                stream.model.admission.check_room(context.request.caller)
            context.timings.render_s = time.monotonic()
            context.prompt = await stream.engine.render(context.request, context.route)
            context.timings.rendered_s = time.monotonic()
            return context.prompt

        lookup = await stream.model.cache.look_up(context, render)
        is_admitted = True  # if not here, then before anything is rendered again
        context.prompt, context.cache_status = lookup.prompt, lookup.status
        stream.lookup = lookup
        stream.stack.push(stream.leave_lookup)

    def _admit(self, streams: Sequence[Stream]) -> None:
        """Let rendered streams of one call, all of one model, go to the engine where they have no
        answer yet. Raises Overloaded.
        """
        now_s = time.monotonic()
        for stream in streams:
            stream.context.timings.prepared_s = now_s
        open_ones = [stream for stream in streams if stream.lookup.needs_engine]
        costs = [_cost(stream.context.request, stream.context.prompt) for stream in open_ones]
        try:
            permits = streams[0].model.admission.admit(streams[0].context.request.caller, costs)
        except ServeError as error:
            for stream in streams:
                stream.context.outcome = str(error.kind)
            raise
        for stream, permit in zip(open_ones, permits, strict=True):
            stream.lookup.generate(stream.work(stream.context.prompt, permit))

    def timeout_s(self, request: GenerateRequest) -> float:
        """How long the request may take. Raises Invalid when it asks for too much."""
        asked_s = request.timeout_s
        if asked_s is None:
            return self._request_timeout_s
        if not 0 < asked_s <= self.max_request_timeout_s:
            raise Invalid(
                f"timeout_s={asked_s:g} is not above 0 and at most this server's "
                f"{self.max_request_timeout_s:g}; ask for something between.",
                param="timeout_s",
            )
        return asked_s

    def _check_open(self) -> None:
        """Raises Unavailable while draining."""
        if self._draining:
            raise Unavailable(
                "The server is shutting down; send the request to another one.", retry_after_s=5
            )

    @property
    def in_flight(self) -> int:
        """Requests from their arrival to their last token."""
        return self._in_flight

    def _left(self, metrics: ModelMetrics) -> None:
        """One request less."""
        self._in_flight -= 1
        metrics.in_flight.dec()
        if not self._in_flight:
            self._idle.set()

    def refused(self, request_id: str, error: ServeError, caller: Caller = ANONYMOUS) -> None:
        """Count and log a request that never became a stream; the edges call it for bad bodies."""
        self._accounting.refused(self.models.first.metrics, request_id, error, caller)

    async def check_ready(self) -> None:
        """Raises Unavailable while draining or without a working engine."""
        if self._draining:
            raise Unavailable("The server is shutting down.")
        for model in self.models:
            await model.engine.check()

    def stop_admitting(self) -> None:
        """From now on every new request is refused; those in flight go on."""
        self._draining = True

    async def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight. False when the time ran out first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class Stream:
    """One request and all that it holds. The pipeline hands it out with its first chunk: iterate it
    to its end (one chunk, when the answer is not streamed), then read `context.usage`; or `close()`
    it to abort.
    """

    lookup: Lookup

    def __init__(
        self, context: RequestContext, model: Model, engine: Engine, timeout_s: float
    ) -> None:
        self.context = context
        self.model = model
        self.engine = engine
        self.deadline = Deadline(timeout_s)
        self.stack = AsyncExitStack()
        """All that the request holds."""
        self._first: Chunk | None = None
        self._chunks: AsyncGenerator[Chunk, None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._is_over = False

    async def step(self, work: Callable[[], Awaitable[Step]]) -> Step:
        """Take a step of the start, within the deadline. If it fails, the request has ended."""
        deadline = self.deadline
        try:
            deadline.watch()
            deadline.waiting = True
            done = await work()
            deadline.waiting = False
            deadline.check()
        except BaseException as error:
            deadline.waiting = False
            await self._end(error)
            raise
        return done

    async def open(self) -> None:
        """Wait for the first chunk. Raises ServeError."""
        context, lookup = self.context, self.lookup
        self._first, self._chunks = await lookup.open(self._work_again)
        context.cached_tokens = self._first.cached_tokens
        context.prompt, context.cache_status = lookup.prompt, lookup.status
        self.stack.push_async_callback(self._chunks.aclose)
        timings = context.timings
        timings.first_s = time.monotonic()
        if context.request.stream:  # otherwise the first chunk is also the last
            waited_s = timings.first_s - timings.arrived_s
            self.model.metrics.time_to_first_token_seconds.observe(waited_s)

    def open_meanwhile(self) -> asyncio.Task[None]:
        """Open in a task of its own, which the first step of an iteration waits for."""
        self._opening = asyncio.create_task(self.step(self.open))
        return self._opening

    def work(self, prompt: Prompt, permit: EnginePermit) -> EngineSource:
        """What the engine does for this request; shared with others, it may outlast the stream."""
        lease = self.context.lease
        if lease is not None and self.lookup.is_shared:
            lease = lease.duplicate()
        return EngineSource(self, prompt, permit, lease)

    def _work_again(self, prompt: Prompt) -> EngineSource:
        """The same, after what the stream shared has failed. Raises Overloaded."""
        context = self.context
        context.timings.prepared_s = time.monotonic()
        (permit,) = self.model.admission.admit(
            context.request.caller, [_cost(context.request, prompt)], counts=False
        )
        return self.work(prompt, permit)

    def leave_lookup(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Tell the look-up how the request ends."""
        context = self.context
        context.prompt, context.cache_status = self.lookup.prompt, self.lookup.status
        outcome = context.outcome
        if outcome is None:
            outcome = error.kind if isinstance(error, ServeError) else ErrorKind.CANCELLED
            if isinstance(error, Exception) and not isinstance(error, ServeError):
                outcome = ErrorKind.INTERNAL
            if self.deadline.passed and isinstance(error, Exception):
                outcome = ErrorKind.DEADLINE  # whatever the engine has made of it
        self.lookup.close(context.completion_tokens, outcome)

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        """The chunks. Raises ServeError when the engine fails on the way; closes in every case."""
        if self._opening is not None:
            await self._opening
        assert self._first is not None
        assert self._chunks is not None
        context, deadline = self.context, self.deadline
        try:
            deadline.watch()
            context.count(self._first)
            yield self._first
            deadline.check()
            deadline.waiting = True
            async for chunk in self._chunks:
                deadline.waiting = False
                context.count(chunk)
                yield chunk
                if deadline.passed:
                    deadline.check()
                deadline.waiting = True
            deadline.waiting = False
            if context.unfinished:
                deadline.check()
                raise RuntimeError("the engine ended a stream without a reason")
            context.outcome = "ok"
        except BaseException as error:
            deadline.waiting = False
            await self._end(error)
            raise
        await self._end(None)

    async def _end(self, error: BaseException | None) -> None:
        """Give back all that the request holds, once. Raises what the caller is to see in the
        place of `error`, if anything.
        """
        if self._is_over:
            return
        self._is_over = True
        kind = type(error) if error else None
        await self.stack.__aexit__(kind, error, error.__traceback__ if error else None)

    async def close(self) -> None:
        """Abort what is still running. Safe to call twice, and after the end."""
        opening = self._opening
        if opening is not None and opening is not asyncio.current_task():
            opening.cancel()
            await asyncio.wait([opening])
            if not opening.cancelled():
                opening.exception()  # looked at, so that asyncio does not complain
        await self._end(None)

    async def abandon(self, error: BaseException) -> None:
        """Abort it, because its call has failed with this."""
        if isinstance(error, Exception) and not isinstance(error, ServeError):
            self.context.outcome = self.context.outcome or str(ErrorKind.INTERNAL)
        await self.close()


class EngineSource:
    """One request's work in the engine, with what it holds there: its permit, its turn on its
    adapter. Satisfies the Work protocol.
    """

    def __init__(
        self, stream: Stream, prompt: Prompt, permit: EnginePermit, lease: Lease | None
    ) -> None:
        context = stream.context
        self._engine = stream.engine
        self._metrics = stream.model.metrics
        self._request, self._route = context.request, context.route
        self._timings = context.timings
        self._prompt = prompt
        if not self._request.stream:
            self._prompt = replace(prompt, when_read=self.begun)
        self._permit = permit
        self._lease = lease
        self._is_read = False
        self._is_over = False

    @property
    def request_id(self) -> str:
        return self._request.request_id

    async def ready(self) -> None:
        if self._lease is not None:
            await self._lease.ready(len(self._prompt.token_ids), self._prompt.max_tokens)
        timings = self._timings
        timings.launched_s = time.monotonic()
        self._metrics.frontend_seconds.observe(timings.launched_s - timings.arrived_s)

    def chunks(self) -> AsyncGenerator[Chunk, None]:
        return self._engine.generate(self._prompt, self._request, self._route)

    def begun(self) -> None:
        if self._is_read or self._is_over:
            return
        self._is_read = True
        self._permit.begun()
        self._metrics.prompt_tokens.inc(len(self._prompt.token_ids))

    def ended(self, completion_tokens: int, outcome: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        used_tokens = len(self._prompt.token_ids) + completion_tokens
        # What came to nothing through no doing of its caller's costs it nothing.
        free = not completion_tokens and outcome in SERVERS_FAULT
        self._permit.ended(0 if free else used_tokens)
        if self._lease is not None:
            self._lease.release(used_tokens)
        self._metrics.completion_tokens.inc(completion_tokens)


def _cost(request: GenerateRequest, prompt: Prompt) -> Cost:
    choices = request.sampling.n
    return Cost(len(prompt.token_ids), prompt.max_tokens * choices, choices)


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

    pumps: list[asyncio.Task[None]] = []
    running = len(streams)
    try:
        for stream in streams:
            pumps.append(asyncio.create_task(pump(len(pumps), stream)))
            if len(pumps) % YIELD_EVERY == 0:
                await asyncio.sleep(0)
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
