"""Where a stream's chunks come from: the engine, the result cache, or another request's generation.

`Service` chooses; `Stream` reads. All satisfy the Source protocol.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from packhorse.serve import metrics
from packhorse.serve.adapters.base import Lease
from packhorse.serve.cache.single_flight import Reader
from packhorse.serve.engines.base import Engine
from packhorse.serve.errors import ErrorKind
from packhorse.serve.limits.admission import Ticket
from packhorse.serve.messages import Chunk, GenerateRequest, Prompt, Route
from packhorse.serve.telemetry.request_timings import Timeline

# Ends that are no doing of the caller's.
SERVERS_FAULT = {ErrorKind.UNAVAILABLE, ErrorKind.INTERNAL, ErrorKind.OVERLOADED}


class Source(Protocol):
    """Begun once; `ended` may be called without it having begun, and more than once."""

    async def ready(self) -> None:
        """Wait until it can begin. Raises ServeError."""
        ...

    def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Raises ServeError."""
        ...

    def begun(self) -> None:
        """The first chunk is there."""
        ...

    def ended(self, completion_tokens: int, outcome: str) -> None:
        """No more is read of it. `outcome` is ok, or the kind of error."""
        ...


class Generation:
    """One request in the engine, with what it holds there: its place, its turn on the adapter."""

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        request: GenerateRequest,
        route: Route,
        ticket: Ticket,
        lease: Lease | None,
        timeline: Timeline,
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._request = request
        self._route = route
        self._ticket = ticket
        self._lease = lease
        self._timeline = timeline
        self._is_over = False

    @property
    def request_id(self) -> str:
        return self._request.request_id

    async def ready(self) -> None:
        if self._lease is not None:
            await self._lease.ready(len(self._prompt.token_ids), self._prompt.max_tokens)
        timeline = self._timeline
        timeline.launched_s = time.monotonic()
        metrics.BEFORE_ENGINE_SECONDS.observe(timeline.launched_s - timeline.arrived_s)

    def chunks(self) -> AsyncGenerator[Chunk, None]:
        return self._engine.generate(self._prompt, self._request, self._route)

    def begun(self) -> None:
        self._ticket.begun()
        metrics.TOKENS.labels("prompt").inc(len(self._prompt.token_ids))

    def ended(self, completion_tokens: int, outcome: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        used_tokens = len(self._prompt.token_ids) + completion_tokens
        # What came to nothing through no doing of its caller's costs it nothing.
        free = not completion_tokens and outcome in SERVERS_FAULT
        self._ticket.ended(0 if free else used_tokens)
        if self._lease is not None:
            self._lease.release(used_tokens)
        metrics.TOKENS.labels("completion").inc(completion_tokens)


class Stored:
    """A result that was kept."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        self._is_over = False

    async def ready(self) -> None: ...

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        for chunk in self._chunks:
            yield chunk

    def begun(self) -> None: ...

    def ended(self, completion_tokens: int, outcome: str) -> None:
        if not self._is_over:
            self._is_over = True
            metrics.CACHE_SAVED_TOKENS.inc(completion_tokens)


class Shared:
    """A generation that equal requests share: the one that leads it, and those that have joined."""

    def __init__(self, reader: Reader, *, whole: bool, leads: bool) -> None:
        """`whole`: nothing is read until it has ended, and then one chunk a choice."""
        self._reader = reader
        self._whole = whole
        self.leads = leads
        self._is_over = False

    async def ready(self) -> None: ...

    def chunks(self) -> AsyncGenerator[Chunk, None]:
        return self._reader.chunks(whole=self._whole)

    def begun(self) -> None: ...

    def ended(self, completion_tokens: int, outcome: str) -> None:
        self._reader.leave()
        if not self._is_over and not self.leads:
            metrics.CACHE_SAVED_TOKENS.inc(completion_tokens)
        self._is_over = True
