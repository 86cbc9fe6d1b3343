"""The whole product on two screens: route, render, look into the cache, admit, start the engine,
hand back a stream.

Every protocol calls `Service.start` and iterates the Stream it returns. All that can still be
refused is refused in `start`, because a streaming response sends its status before its first item.
Counts, metrics and the one log line a request are kept here and in the Stream, so that they are the
same for every protocol.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import uuid
from collections.abc import Sequence

from packhorse.serve import metrics
from packhorse.serve.adapters.base import Adapters
from packhorse.serve.cache.base import Results
from packhorse.serve.cache.key import Key, Unkeyable
from packhorse.serve.engines.base import Engine
from packhorse.serve.errors import ErrorKind, Invalid, ServeError, Unavailable
from packhorse.serve.limits.admission import Admission, Demand, Place
from packhorse.serve.messages import ANONYMOUS, Caller, GenerateRequest, Route
from packhorse.serve.models import Models
from packhorse.serve.routing.base import Routing
from packhorse.serve.sources import Generation, Shared, Stored
from packhorse.serve.stream import Stream
from packhorse.serve.telemetry.logs import RequestLog
from packhorse.serve.telemetry.request_timings import Timeline
from packhorse.serve.tenancy import Tenancy

# Who has read nothing of a shared generation that ends like this may try again, so often: for the
# first two the reasons were its leader's own; the last may have been the request's doing.
MAX_TRIES = {ErrorKind.CANCELLED: 3, ErrorKind.OVERLOADED: 3, ErrorKind.UNAVAILABLE: 1}


# What goes into logs and headers as it is.
CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id_from(sent: str | bytes | None) -> str:
    """The client's own id when it is harmless, or else a new one."""
    if isinstance(sent, str) and CLIENT_ID.fullmatch(sent):
        return sent
    return uuid.uuid4().hex


class Service:
    """One engine behind one model name, and its adapters behind theirs. Answers "not yet" until the
    engine is attached.
    """

    def __init__(
        self,
        model: str,
        *,
        admission: Admission | None = None,
        adapters: Adapters | None = None,
        routing: Routing | None = None,
        cache: Results | None = None,
        tenancy: Tenancy | None = None,
        log: RequestLog | None = None,
        request_timeout_s: float = 600.0,
        max_request_timeout_s: float = 3600.0,
    ) -> None:
        """A request takes at most request_timeout_s, or what it asks for up to the maximum.
        `tenancy` None: one with a secret of its own.
        """
        self.model = model
        self.models = Models(model, adapters, routing)
        self.admission = admission or Admission()
        self._cache = cache
        self._tenancy = tenancy or Tenancy(secrets.token_bytes(32))
        self._log = log or RequestLog()
        self._request_timeout_s = request_timeout_s
        self.max_request_timeout_s = max_request_timeout_s
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

    def enter(self, caller: Caller) -> Place:
        """The first step of every call, before its body is read; leave the place after the last.

        Raises Unavailable while draining, Overloaded above the limits on calls at once.
        """
        self._check_open()
        return self.admission.enter(caller)

    async def start(self, request: GenerateRequest) -> Stream:
        """Do everything that can still be refused; return once the first chunk is in hand.

        Raises ServeError.
        """
        stream = self._new_stream(request)
        try:
            await self._prepare(stream)
            self._admit([stream])
            await stream.open()
        except BaseException as error:
            await stream.abandon(error)  # nearly always over already
            raise
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
                stream = self._new_stream(request)
                streams.append(stream)
                await self._prepare(stream)
            self._admit(streams)
            openings = [stream.open_meanwhile() for stream in streams]
            done, _ = await asyncio.wait(openings, return_when=asyncio.FIRST_COMPLETED)
            for opening in done:
                opening.result()
        except BaseException as error:
            for stream in streams:
                await stream.abandon(error)
            raise
        return streams

    def _new_stream(self, request: GenerateRequest) -> Stream:
        """A new stream, counted as in flight until its end. Raises ServeError."""
        timeline = Timeline()
        try:
            self._check_open()
            engine, timeout_s = self.engine, self._timeout_s(request)
            lease, stage = self.models.lease(request)
            adapter = lease.adapter if lease else None
            salt = self._tenancy.prefix_cache_salt(request.caller.tenant, request.cache_salt)
            route = Route(self.model, adapter, stage, salt)
            metrics.ROUTES.labels(route.adapter.name if route.adapter else "", stage).inc()
            timeline.routed_s = time.monotonic()
            stream = Stream(
                engine,
                request,
                route,
                lease=lease,
                timeline=timeline,
                timeout_s=timeout_s,
                log=self._log,
                on_end=self._ended,
                again=self._find_again,
            )
        except ServeError as error:
            self.refused(request.request_id, error, request.caller)
            raise
        self._in_flight += 1
        self._idle.clear()
        metrics.IN_FLIGHT.set(self._in_flight)
        return stream

    async def _prepare(self, stream: Stream) -> None:
        """Render the request, unless the cache knows its prompt and has its answer too. Raises
        ServeError.
        """
        cache, request = self._cache, stream.request
        if cache is None or not cache.concerns(request):
            await stream.render()
            return
        try:
            known = cache.known(request)
            is_rendered = known is None
            if known is None:
                await stream.render()
                known = cache.learn(request, stream.prompt)
        except Unkeyable:
            await stream.render()
            return
        stream.prompt = known.prompt
        timeline = stream.timeline
        timeline.lookup_s = time.monotonic()
        key = cache.key(request, stream.route, known)
        if key is not None:
            await self._find(stream, key, cache)
        timeline.looked_up_s = time.monotonic()
        if stream.source is None and not is_rendered:
            await stream.render()

    async def _find(self, stream: Stream, key: Key, cache: Results) -> None:
        """Give the stream a source that needs no place in the engine, if there is one. If not,
        others wait for its result from now on.
        """
        request = stream.request
        anew = request.cache.mode == "refresh"
        flight = None if anew else cache.flight(key)
        # One that has not begun may yet find a result that is too old for this caller.
        if flight is not None and (flight.is_launched or request.cache.max_age_s is None):
            stream.mark = "coalesced"
            metrics.CACHE_COALESCED.inc()
            stream.source = Shared(flight.join(), whole=not request.stream, leads=False)
            return
        result = None if anew else cache.recall(key, request)
        if result is None:
            flight = stream.leading = cache.lead(key)
            if cache.has_store and not anew:
                result = await stream.guarded(lambda: cache.fetch(key, request))
                if result is not None:
                    stream.leading = None
                    flight.settle(result.chunks)
        stream.mark = "hit" if result else "miss"
        if result is not None:
            stream.source = Stored(result.chunks)

    async def _find_again(self, stream: Stream, error: ServeError) -> bool:
        """Another source for a stream that has read nothing of a generation that it shared. Raises
        ServeError.
        """
        source = stream.source
        if not isinstance(source, Shared):
            return False
        if source.leads and error.kind is ErrorKind.OVERLOADED:
            return False  # its own
        stream.tries += 1
        is_left_alone = stream.tries > MAX_TRIES.get(error.kind, 0)
        if is_left_alone and error.kind is not ErrorKind.CANCELLED:
            return False
        stream.source = None
        if is_left_alone:  # by one leader after the other: by itself, then
            await stream.render()
        else:
            await self._prepare(stream)
        self._admit([stream], again=True)
        return True

    def _admit(self, streams: Sequence[Stream], *, again: bool = False) -> None:
        """Let rendered streams of one call go to the engine, those that have no source yet. Raises
        Overloaded, which ends them.
        """
        now_s = time.monotonic()
        for stream in streams:
            stream.timeline.prepared_s = now_s
        open_ones = [stream for stream in streams if stream.source is None]
        demands = [
            Demand(
                len(stream.prompt.token_ids),
                stream.prompt.max_tokens * stream.request.sampling.n,
                stream.request.sampling.n,
            )
            for stream in open_ones
        ]
        try:
            caller = streams[0].request.caller
            tickets = self.admission.admit(caller, demands, counts=not again)
        except ServeError as error:
            for stream in streams:
                stream.end(error.kind)
            raise
        for stream, ticket in zip(open_ones, tickets, strict=True):
            request, lease, flight = stream.request, stream.lease, stream.leading
            if flight is not None and lease is not None:
                lease = lease.again()  # the generation may outlast the stream
            generation = Generation(
                self.engine, stream.prompt, request, stream.route, ticket, lease, stream.timeline
            )
            stream.source = generation
            if flight is not None:
                stream.leading = None
                stream.source = Shared(flight.join(), whole=not request.stream, leads=True)
                flight.launch(generation, request.sampling.n)

    def _timeout_s(self, request: GenerateRequest) -> float:
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

    async def tokenize(self, request: GenerateRequest) -> Sequence[int]:
        """Token ids of the request's prompt, as its generation would see them."""
        self.models.check(request.model, request.caller)
        return await self.engine.tokenize(request)

    @property
    def in_flight(self) -> int:
        """Requests from their arrival to their last token."""
        return self._in_flight

    @property
    def has_cache(self) -> bool:
        return self._cache is not None

    def refused(self, request_id: str, error: ServeError, caller: Caller = ANONYMOUS) -> None:
        """Count and log a request that never became a stream; the edges call it for bad bodies."""
        metrics.REQUESTS.labels(error.kind).inc()
        self._log.line(request_id, caller, error.kind)

    def _ended(self) -> None:
        """One request less."""
        self._in_flight -= 1
        metrics.IN_FLIGHT.set(self._in_flight)
        if not self._in_flight:
            self._idle.set()

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
