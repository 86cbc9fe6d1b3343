"""One generation for equal requests that are on their way at the same time.

The first of them leads: it makes a Flight, finds a result or a place in the engine, and launches.
The others join, and read the chunks from the first one on, each at its own pace. The generation
belongs to none of them: it goes on while anybody reads, and is aborted when the last has left.

A stream that nobody shares is read by its only reader itself, which costs a token next to nothing.
Where there are several, a task reads it at the engine's pace.

    flight = flights.lead(key, streams=True)    # before the first await, so that nobody else does
    ... flight.settle(result) | flight.fail(error) | flight.launch(work, choices)
    reader = flight.join()
    async for chunk in reader.chunks(): ...
    reader.leave()
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

from packhorse.serve.cache.base import Work
from packhorse.serve.cache.codec import joined
from packhorse.serve.errors import Cancelled, Internal, ServeError
from packhorse.serve.messages import Chunk

logger = logging.getLogger("packhorse.cache")

_LEFT = Cancelled("Nobody waited for this any more.")


class Flight:
    """See above. Every flight must be settled, failed or launched."""

    def __init__(
        self,
        on_end: Callable[[Flight, tuple[Chunk, ...] | None], None],
        *,
        streams: bool = True,
    ) -> None:
        """`on_end` gets the whole answer, one chunk a choice; or None when there is none."""
        self.streams = streams
        """Whether the chunks come while they are generated, or all at the end."""
        self._on_end = on_end
        self._chunks: list[Chunk] = []
        self._readers = 0
        self._unfinished = 0
        """Choices whose last chunk has not come."""
        self._is_over = False
        self._error: ServeError | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self._work: Work | None = None
        self._source: AsyncGenerator[Chunk, None] | None = None
        self._running: asyncio.Task[None] | None = None
        self._is_lent = False
        """Whether the only reader is to read the source, since no task does."""
        self._is_pulled = False
        """Whether the only reader waits for the source at this moment."""

    @property
    def is_launched(self) -> bool:
        """Whether it generates; before that, it may still find an old result."""
        return self._work is not None

    def join(self) -> Reader:
        self._readers += 1
        if self._is_lent:
            self._run()
        return Reader(self, waits=self._is_pulled)

    def settle(self, chunks: Sequence[Chunk]) -> None:
        """The answer is there already."""
        self._chunks += chunks
        self._end(None, None)

    def fail(self, error: ServeError) -> None:
        """There will be no answer, at least not from here."""
        self._end(error, None)

    def launch(self, work: Work, choices: int) -> None:
        self._work, self._unfinished = work, choices
        self._run()

    def _run(self) -> None:
        """Have a task read the source."""
        self._is_lent = False
        self._running = asyncio.create_task(self._read())
        self._running.add_done_callback(self._has_run)

    def _has_run(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # before its first step, perhaps: then it never ran
            self._abandon()

    async def _read(self) -> None:
        """Read the generation to its end, or until its only reader can. What goes wrong is told to
        the readers.
        """
        work = self._work
        assert work is not None
        error: ServeError | None = _LEFT
        try:
            if self._source is None:
                await work.ready()
                self._source = work.chunks()
            async for chunk in self._source:
                self._took(chunk)
                if self._readers == 1 and self.streams and self._unfinished > 0:
                    self._lend()
                    return
            error = self._error_at_end()
        except Exception as failure:  # noqa: BLE001 `_error_of` logs it
            error = self._error_of(failure)
        finally:
            if not self._is_lent:
                self._land(error)
                if self._source is not None:
                    await self._close(self._source)

    def _lend(self) -> None:
        """From now on the only reader reads the source."""
        self._is_lent = True
        self._tell()

    async def pull(self) -> None:
        """Read one chunk, by the only reader and in its task. What goes wrong is told as ever."""
        source = self._source
        assert source is not None
        self._is_lent, self._is_pulled = False, True
        try:
            chunk = await anext(source)
            self._took(chunk)
            if self._unfinished <= 0:
                async for chunk in source:
                    self._took(chunk)
                self._land(self._error_at_end())
        except StopAsyncIteration:
            self._land(self._error_at_end())
        except Exception as failure:  # noqa: BLE001 `_error_of` logs it
            self._land(self._error_of(failure))
        except BaseException:  # the reader's request has ended; who has joined since may try again
            self._land(_LEFT)
            raise
        finally:
            self._is_pulled = False
        if self._is_over:
            await self._close(source)
        elif not self._readers:
            self._abandon()
        elif self._readers == 1:
            self._is_lent = True
        else:
            self._run()

    def _took(self, chunk: Chunk) -> None:
        if not self._chunks:
            assert self._work is not None
            self._work.begun()
        self._chunks.append(chunk)
        if chunk.finish_reason is not None:
            self._unfinished -= 1
        # The last is told with the end, when the result is kept.
        if self._waiting and self._unfinished > 0:
            self._tell()

    def _error_at_end(self) -> ServeError | None:
        """The source has ended."""
        if self._unfinished > 0:
            return self._error_of(RuntimeError("the engine ended a generation without a reason"))
        return None

    def _error_of(self, failure: Exception) -> ServeError:
        if isinstance(failure, ServeError):
            return failure
        assert self._work is not None
        logger.error(
            "request_id=%s failed unexpectedly; equal requests may share it",
            self._work.request_id,
            exc_info=failure,
        )
        return Internal(
            "The server failed on this request; its log says more under request id "
            f"{self._work.request_id}."
        )

    def _land(self, error: ServeError | None) -> None:
        if self._is_over:
            return
        assert self._work is not None
        tokens = sum(len(chunk.token_ids) for chunk in self._chunks)
        self._work.ended(tokens, "ok" if error is None else error.kind)
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
        if not self._readers and self._work is not None and not self._is_over:
            if self._is_lent:
                self._is_lent = False
                self._abandon()
                return
            if self._running is not None:
                self._running.cancel()
            # Nobody may join what is being aborted.
            self._on_end(self, None)

    def _abandon(self) -> None:
        """Nobody reads the source any more."""
        self._land(_LEFT)
        if self._source is not None:
            self._running = asyncio.create_task(self._close(self._source))

    async def _close(self, source: AsyncGenerator[Chunk, None]) -> None:
        """Abort the generation in the engine, if it has not ended."""
        try:
            await source.aclose()
        except Exception as failure:  # noqa: BLE001 `_error_of` logs it
            self._error_of(failure)


class Reader:
    """One request's way through a flight."""

    def __init__(self, flight: Flight, *, waits: bool) -> None:
        """`waits`: first of all for news. Until then the flight hangs on another reader, and one
        that has read nothing may begin again if that reader leaves.
        """
        self._flight: Flight | None = flight
        self._waits = waits

    async def chunks(self, *, whole: bool) -> AsyncGenerator[Chunk, None]:
        """As they come; `whole`: one a choice, at the end. Raises ServeError."""
        flight, read = self._flight, 0
        if flight is None:
            raise RuntimeError("a reader that has left cannot read")
        chunks = flight._chunks
        if self._waits and flight._is_pulled:
            await flight._news()
            if flight._error is not None:
                raise copy.copy(flight._error)
        while True:
            while not whole and read < len(chunks):
                yield chunks[read]
                read += 1
            if flight._is_over:
                break
            if flight._is_lent:
                await flight.pull()
            else:
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

    def lead(
        self,
        digest: bytes,
        on_end: Callable[[tuple[Chunk, ...] | None], None],
        *,
        streams: bool = True,
    ) -> Flight:
        """A flight that others can join, unless they have one for this digest already that is as
        good: streams cannot join one that does not stream.
        """

        def ended(flight: Flight, whole: tuple[Chunk, ...] | None) -> None:
            if self._flying.get(digest) is flight:
                del self._flying[digest]
            on_end(whole)

        flight = Flight(ended, streams=streams)
        known = self._flying.get(digest)
        if known is None or (streams and not known.streams):
            self._flying[digest] = flight
        return flight
