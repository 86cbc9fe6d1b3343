"""One request's way to its answer through the result cache: a kept result, an equal request's
generation, or one of its own that others may share.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from packhorse.serve.cache.base import Render, Work, WorkAgain, begin
from packhorse.serve.cache.codec import Result
from packhorse.serve.cache.key import Key, Unkeyable
from packhorse.serve.cache.render_cache import Known
from packhorse.serve.cache.single_flight import Flight, Reader
from packhorse.serve.errors import Cancelled, ErrorKind, ServeError
from packhorse.serve.messages import CacheStatus, Chunk, GenerateRequest, Prompt, Route
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.request_context import RequestContext

# How many times a coalesced request retries after its leader fails, by error kind. For the first
# two the reasons were its leader's own; the last may have been the request's doing.
MAX_RETRIES = {ErrorKind.CANCELLED: 3, ErrorKind.OVERLOADED: 3, ErrorKind.UNAVAILABLE: 1}


class Tiers(Protocol):
    """What a look-up asks of the result cache; ResultCache is the real one."""

    metrics: ModelMetrics

    def concerns(self, request: GenerateRequest) -> bool:
        """Whether its result may be looked up or kept, as far as can be told before rendering."""
        ...

    def known(self, request: GenerateRequest) -> Known | None:
        """An equal request's prompt, without what the engine wants. Raises Unkeyable."""
        ...

    def learn(self, request: GenerateRequest, prompt: Prompt) -> Known:
        """Remember the request's prompt. Raises Unkeyable."""
        ...

    def key(self, request: GenerateRequest, route: Route, known: Known) -> Key | None:
        """What its result is kept under; None when it is neither looked up nor kept."""
        ...

    def flight(self, key: Key) -> Flight | None:
        """The generation of an equal request that is on its way."""
        ...

    def lead(self, key: Key, *, streams: bool) -> Flight:
        """A new flight. Others join it, unless this key has one already that is as good."""
        ...

    def recall(self, key: Key, request: GenerateRequest) -> Result | None:
        """From memory, at once. None while flushes on other replicas cannot be heard of."""
        ...

    @property
    def has_store(self) -> bool:
        """Whether `fetch` could find more."""
        ...

    async def fetch(self, key: Key, request: GenerateRequest) -> Result | None:
        """From the store. Never raises: what cannot be had is not there."""
        ...


class CacheLookup:
    """Satisfies the Lookup protocol."""

    def __init__(self, tiers: Tiers, context: RequestContext, render: Render) -> None:
        self.status: CacheStatus = "bypass"
        self._tiers = tiers
        self._context = context
        self._request = context.request
        self._render = render
        self._prompt: Prompt | None = None
        self._stored: Sequence[Chunk] | None = None
        self._reader: Reader | None = None
        self._leads = False
        self._leading: Flight | None = None
        """What others wait for, and what has not been launched yet."""
        self._work: Work | None = None
        self._retries = 0
        self._is_over = False

    @property
    def prompt(self) -> Prompt:
        assert self._prompt is not None
        return self._prompt

    @property
    def needs_engine(self) -> bool:
        return self._stored is None and self._reader is None and self._work is None

    @property
    def is_shared(self) -> bool:
        return self._leading is not None

    async def find(self) -> None:
        """Find what needs no place in the engine; else have the prompt rendered, while equal
        requests wait for this one. Raises what rendering raises.
        """
        try:
            await self._find()
        except BaseException:
            self._context.cache_status = self.status
            if self._prompt is not None:
                self._context.prompt = self._prompt
            self.close(0, ErrorKind.CANCELLED)
            raise

    async def _find(self) -> None:
        tiers, request, timings = self._tiers, self._request, self._context.timings
        try:
            known = tiers.known(request)
            is_rendered = known is None
            if known is None:
                self._prompt = await self._render(for_engine=False)
                known = tiers.learn(request, self._prompt)
        except Unkeyable:
            if self._prompt is None:
                self._prompt = await self._render(for_engine=True)
            return
        self._prompt = known.prompt
        timings.lookup_s = time.monotonic()
        key = tiers.key(request, self._context.route, known)
        if key is not None:
            await self._look(key)
        timings.looked_up_s = time.monotonic()
        if self.needs_engine and not is_rendered:
            self._prompt = await self._render(for_engine=True)

    async def _look(self, key: Key) -> None:
        tiers, request = self._tiers, self._request
        anew = request.cache.mode == "refresh"
        flight = None if anew else tiers.flight(key)
        if flight is not None and request.stream and not flight.streams:
            flight = None  # a stream that joined would say nothing until the end
        # A flight that is not launched may still find a kept result, too old for this caller.
        if flight is not None and (flight.is_launched or request.cache.max_age_s is None):
            self.status = "coalesced"
            tiers.metrics.cache_coalesced.inc()
            self._reader = flight.join()
            return
        result = None if anew else tiers.recall(key, request)
        if result is None:
            flight = self._leading = tiers.lead(key, streams=request.stream)
            if tiers.has_store and not anew:
                result = await tiers.fetch(key, request)
                if result is not None:
                    self._leading = None
                    flight.settle(result.chunks)
        self.status = "hit" if result else "miss"
        if result is not None:
            self._stored = result.chunks

    def generate(self, work: Work) -> None:
        flight, self._leading = self._leading, None
        if flight is None:
            self._work = work
            return
        self._leads = True
        self._reader = flight.join()
        flight.launch(work, self._request.sampling.n)

    async def open(self, again: WorkAgain) -> tuple[Chunk, AsyncGenerator[Chunk, None]]:
        while True:
            try:
                return await begin(self)
            except ServeError as error:
                if self._work is not None:
                    self._work.ended(0, error.kind)
                if self._reader is None:
                    raise
                self._reader.leave()
                await self._retry(error)
            if self.needs_engine:
                self.generate(again(self.prompt))

    async def _retry(self, error: ServeError) -> None:
        """Look again, after the generation that this request shared has failed. Raises the error
        where there is nothing to look for.
        """
        if self._leads and error.kind is ErrorKind.OVERLOADED:
            raise error  # its own
        self._retries += 1
        is_left_alone = self._retries > MAX_RETRIES.get(error.kind, 0)
        if is_left_alone and error.kind is not ErrorKind.CANCELLED:
            raise error
        self._reader, self._leads = None, False
        if is_left_alone:  # by one leader after the other: by itself, then
            self._prompt = await self._render(for_engine=True)
        else:
            await self.find()

    # What `begin` asks of a piece of work

    @property
    def request_id(self) -> str:
        return self._request.request_id

    async def ready(self) -> None:
        if self._work is not None:
            await self._work.ready()

    def chunks(self) -> AsyncGenerator[Chunk, None]:
        if self._stored is not None:
            return _replay(self._stored)
        if self._reader is not None:
            return self._reader.chunks(whole=not self._request.stream)
        assert self._work is not None
        return self._work.chunks()

    def begun(self) -> None:
        if self._work is not None:
            self._work.begun()

    def ended(self, completion_tokens: int, outcome: str) -> None:
        self.close(completion_tokens, outcome)

    def close(self, completion_tokens: int, outcome: str) -> None:
        if self._leading is not None:
            flight, self._leading = self._leading, None
            flight.fail(Cancelled("The request that this one waited for has ended."))
        if self._work is not None:
            self._work.ended(completion_tokens, outcome)
        if self._reader is not None:
            self._reader.leave()
        is_saved = self._stored is not None or (self._reader is not None and not self._leads)
        if is_saved and not self._is_over:
            self._tiers.metrics.cache_saved_tokens.inc(completion_tokens)
        self._is_over = True


async def _replay(chunks: Sequence[Chunk]) -> AsyncGenerator[Chunk, None]:
    for chunk in chunks:
        yield chunk
