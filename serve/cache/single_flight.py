"""One generation for equal requests that are on their way at the same time.

The first of them leads: it makes a Flight, finds a result or a place in the engine, and launches.
The others join, and read the chunks from the first one on, each at its own pace. The generation
belongs to none of them: it goes on while anybody reads, and is aborted when the last has left.

    flight = flights.lead(key)                  # before the first await, so that nobody else does
    ... flight.settle(result) | flight.fail(error) | flight.launch(work)
    reader = flight.join()
    async for chunk in reader.chunks(): ...
    reader.leave()
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from packhorse.serve.cache.base import Work
from packhorse.serve.cache.codec import joined
from packhorse.serve.errors import Cancelled, Internal, ServeError
from packhorse.serve.messages import Chunk

logger = logging.getLogger("packhorse.cache")

_LEFT = Cancelled("Nobody waited for this any more.")


class Flight:
    """See above. Every flight must be settled, failed or launched."""

    def __init__(self, on_end: Callable[[Flight, tuple[Chunk, ...] | None], None]) -> None:
        """`on_end` gets the whole answer, one chunk a choice; or None when there is none."""
        self._on_end = on_end
        self._chunks: list[Chunk] = []
        self._readers = 0
        self._is_over = False
        self._error: ServeError | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._running: asyncio.Task[None] | None = None

    @property
    def is_launched(self) -> bool:
        """Whether it generates; before that, it may still find an old result."""
        return self._running is not None

    def join(self) -> Reader:
        self._readers += 1
        return Reader(self)

    def settle(self, chunks: Sequence[Chunk]) -> None:
        """The answer is there already."""
        self._chunks += chunks
        self._end(None, None)

    def fail(self, error: ServeError) -> None:
        """There will be no answer, at least not from here."""
        self._end(error, None)

    def launch(self, work: Work, choices: int) -> None:
        running = self._running = asyncio.create_task(self._run(work, choices))
        # A task that is cancelled before its first step never runs.
        running.add_done_callback(lambda _: self._land(work, _LEFT))

    async def _run(self, work: Work, choices: int) -> None:
        """Read the generation to its end. What goes wrong is told to the readers."""
        unfinished, read = choices, self._chunks
        error: ServeError | None = _LEFT
        try:
            await work.ready()
            async with aclosing(work.chunks()) as chunks:
                async for chunk in chunks:
                    if not read:
                        work.begun()
                    read.append(chunk)
                    if chunk.finish_reason is not None:
                        unfinished -= 1
                    # The last is told with the end, when the result is kept.
                    if self._waiting and unfinished:
                        self._tell()
            if unfinished:
                raise RuntimeError("the engine ended a generation without a reason")
            error = None
        except ServeError as failure:
            error = failure
        except Exception:
            logger.exception(
                "request_id=%s failed unexpectedly; equal requests may share it",
                work.request_id,
            )
            error = Internal(
                "The server failed on this request; its log says more under request id "
                f"{work.request_id}."
            )
        finally:
            self._land(work, error)

    def _land(self, work: Work, error: ServeError | None) -> None:
        if self._is_over:
            return
        tokens = sum(len(chunk.token_ids) for chunk in self._chunks)
        work.ended(tokens, "ok" if error is None else error.kind)
        self._end(error, None if error else joined(self._chunks))

    def _end(self, error: ServeError | None, whole: tuple[Chunk, ...] | None) -> None:
        self._is_over = True
        self._error = error
        try:
            self._on_end(self, whole)
        except Exception:  # readers wait for this, whatever becomes of the result
            logger.exception("A result could not be kept")
        self._tell()

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():  # or its reader was cancelled
                waiter.set_result(None)

    def _news(self) -> asyncio.Future[None]:
        """Done when there is more to read."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        return waiter

    def _left(self) -> None:
        self._readers -= 1
        if not self._readers and self._running is not None and not self._is_over:
            self._running.cancel()
            # Nobody may join what is being aborted.
            self._on_end(self, None)


class Reader:
    """One request's way through a flight."""

    def __init__(self, flight: Flight) -> None:
        self._flight: Flight | None = flight

    async def chunks(self, *, whole: bool) -> AsyncGenerator[Chunk, None]:
        """As they come; `whole`: one a choice, at the end. Raises ServeError."""
        flight, read = self._flight, 0
        if flight is None:
            raise RuntimeError("a reader that has left cannot read")
        chunks = flight._chunks
        while True:
            while not whole and read < len(chunks):
                yield chunks[read]
                read += 1
            if flight._is_over:
                break
            await flight._news()
        if flight._error is not None:
            # Of its own: a traceback grows with each that raises it.
            raise copy.copy(flight._error)
        if whole:
            for chunk in joined(chunks):
                yield chunk

    def leave(self) -> None:
        """Read no more. Safe to call twice."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight._left()


class Flights:
    """The flights of one server, by key."""

    def __init__(self) -> None:
        self._flying: dict[bytes, Flight] = {}

    def get(self, digest: bytes) -> Flight | None:
        return self._flying.get(digest)

    def lead(self, digest: bytes, on_end: Callable[[tuple[Chunk, ...] | None], None]) -> Flight:
        """A flight that others can join, unless they have one for this digest already."""

        def ended(flight: Flight, whole: tuple[Chunk, ...] | None) -> None:
            if self._flying.get(digest) is flight:
                del self._flying[digest]
            on_end(whole)

        flight = Flight(ended)
        self._flying.setdefault(digest, flight)
        return flight
