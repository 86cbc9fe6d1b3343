"""The whole product on two screens: route, render, start the engine, hand back a stream.

Every protocol calls `Service.start` and iterates the Stream it returns. All that can still be
refused is refused in `start`, because a streaming response sends its status before its first item.
Counts, metrics and the one log line a request are kept here, so that they are the same for every
protocol.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import TypeVar

from serve import metrics
from serve.engines.base import Engine
from serve.errors import ErrorKind, Internal, ServeError, Unavailable, UnknownModel
from serve.messages import Chunk, GenerateRequest, Prompt, Route, Usage

logger = logging.getLogger("packhorse.request")

Step = TypeVar("Step")


class Stream:
    """A request that has its first chunk. Iterate it to its end, then read `usage`; or `close()` it
    to abort.
    """

    def __init__(
        self,
        service: Service,
        engine: Engine,
        request: GenerateRequest,
        route: Route,
        arrived_s: float,
    ) -> None:
        self.request = request
        self.route = route
        self.prompt = Prompt((), 0)
        self._service = service
        self._engine = engine
        self._arrived_s = arrived_s
        self._first_s = 0.0
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
        self.prompt = await self._guarded(self._engine.render(self.request, self.route))

    async def open(self) -> None:
        """Start the engine and wait for the first chunk. Raises ServeError."""
        self._chunks = self._engine.generate(self.prompt, self.request, self.route)
        self._first = await self._guarded(anext(self._chunks))
        self._first_s = time.monotonic() - self._arrived_s
        if self.request.stream:  # otherwise the first chunk is also the last
            metrics.FIRST_TOKEN_SECONDS.observe(self._first_s)

    def open_meanwhile(self) -> asyncio.Task[None]:
        """Open in a task of its own, which the first step of an iteration waits for."""
        self._opening = asyncio.create_task(self.open())
        return self._opening

    async def _guarded(self, step: Awaitable[Step]) -> Step:
        """Await a step of the start; if it fails, this request has ended."""
        try:
            return await step
        except asyncio.CancelledError:
            await self.close()
            raise
        except ServeError as error:
            self.end(error.kind)
            raise
        except Exception as error:
            self._service.log_unexpected(self.request.request_id)
            self.end(ErrorKind.INTERNAL)
            raise Internal(
                "The server failed on this request; the request id leads to its log."
            ) from error

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
        try:
            self._count(self._first)
            yield self._first
            async for chunk in self._chunks:
                self._count(chunk)
                yield chunk
            if self._unfinished:
                raise RuntimeError("the engine ended a stream without a reason")
            self.end("ok")
        except (GeneratorExit, asyncio.CancelledError):
            self.end(ErrorKind.CANCELLED)
            raise
        except ServeError as error:
            self.end(error.kind)
            raise
        except Exception as error:
            self._service.log_unexpected(self.request.request_id)
            self.end(ErrorKind.INTERNAL)
            raise Internal(
                "The server failed while it answered; the request id leads to its log."
            ) from error
        finally:
            await self._chunks.aclose()

    def _count(self, chunk: Chunk) -> None:
        self._completion_tokens += len(chunk.token_ids)
        if chunk.cached_tokens:
            self._cached_tokens = chunk.cached_tokens
        if chunk.finish_reason is not None:
            self._unfinished -= 1
            self._reasoning_tokens += chunk.reasoning_tokens

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

    def end(self, outcome: str) -> None:
        """Count and log the request, once."""
        if self._outcome is not None:
            return
        self._outcome = str(outcome)
        self._service.ended()
        total_s = time.monotonic() - self._arrived_s
        metrics.REQUESTS.labels(self._outcome).inc()
        metrics.REQUEST_SECONDS.observe(total_s)
        usage = self.usage
        metrics.TOKENS.labels("prompt").inc(usage.prompt_tokens)
        metrics.TOKENS.labels("completion").inc(usage.completion_tokens)
        logger.info(
            "request_id=%s model=%s adapter=%s outcome=%s prompt_tokens=%d completion_tokens=%d "
            "cached_tokens=%d first_token_s=%.3f total_s=%.3f",
            self.request.request_id, self.route.model, self.route.adapter or "-", self._outcome,
            usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens,
            self._first_s, total_s,
        )  # fmt: skip


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


class Service:
    """One engine behind one model name. Answers "not yet" until the engine is attached."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.created_s = int(time.time())
        self._engine: Engine | None = None
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def engine(self) -> Engine:
        """Raises Unavailable while the engine loads."""
        if self._engine is None:
            raise Unavailable("The engine is still loading; try again soon.", retry_after_s=10)
        return self._engine

    def attach(self, engine: Engine) -> None:
        """Serve with this engine from now on."""
        self._engine = engine

    async def start(self, request: GenerateRequest) -> Stream:
        """Do everything that can still be refused; return once the first chunk is in hand.

        Raises ServeError.
        """
        stream = self._admitted(request)
        await stream.render()
        await stream.open()
        return stream

    async def start_all(self, requests: Sequence[GenerateRequest]) -> list[Stream]:
        """Start the requests of one call; return once the first of them has its first chunk.

        All are rendered before any is generated, so that a bad one costs nothing; when one is
        refused, or the caller leaves, all others are ended too. Raises ServeError.
        """
        if len(requests) == 1:
            return [await self.start(requests[0])]
        streams: list[Stream] = []
        try:
            for request in requests:
                stream = self._admitted(request)
                streams.append(stream)
                await stream.render()
            openings = [stream.open_meanwhile() for stream in streams]
            done, _ = await asyncio.wait(openings, return_when=asyncio.FIRST_COMPLETED)
            for opening in done:
                opening.result()
        except BaseException:
            for stream in streams:
                await stream.close()
            raise
        return streams

    def _admitted(self, request: GenerateRequest) -> Stream:
        """A new stream, counted as in flight until its end. Raises ServeError."""
        arrived_s = time.monotonic()
        try:
            if self._draining:
                raise Unavailable(
                    "The server is shutting down; send the request to another one.", retry_after_s=5
                )
            stream = Stream(self, self.engine, request, self._route(request), arrived_s)
        except ServeError as error:
            self.refused(request.request_id, error)
            raise
        self._in_flight += 1
        self._idle.clear()
        metrics.IN_FLIGHT.set(self._in_flight)
        return stream

    async def tokenize(self, request: GenerateRequest) -> Sequence[int]:
        """Token ids of the request's prompt, as its generation would see them."""
        self._route(request)
        return await self.engine.tokenize(request)

    def _route(self, request: GenerateRequest) -> Route:
        self.check_model(request.model)
        return Route(self.model)

    def check_model(self, name: str) -> None:
        """Raises UnknownModel for a name that is not served."""
        if name != self.model:
            raise UnknownModel(
                f"There is no model {name!r} here; this server has {self.model!r}.", param="model"
            )

    def refused(self, request_id: str, error: ServeError) -> None:
        """Count and log a request that never became a stream; the edges call it for bad bodies."""
        metrics.REQUESTS.labels(error.kind).inc()
        logger.info("request_id=%s outcome=%s", request_id, error.kind)

    def ended(self) -> None:
        """One request less (called by its Stream)."""
        self._in_flight -= 1
        metrics.IN_FLIGHT.set(self._in_flight)
        if not self._in_flight:
            self._idle.set()

    def log_unexpected(self, request_id: str) -> None:
        """The one log entry of a bug, with its traceback; call it while the exception is being
        handled.
        """
        logger.exception("request_id=%s failed unexpectedly", request_id)

    async def check_ready(self) -> None:
        """Raises Unavailable while draining or without a working engine."""
        if self._draining:
            raise Unavailable("The server is shutting down.")
        await self.engine.check()

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
