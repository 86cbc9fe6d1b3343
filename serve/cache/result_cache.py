"""The result cache: memory over a shared store, flights over both. It satisfies the protocols
Results (for operators) and Tiers (for look-ups).

A kept result is given out only while this replica knows of every flush. With a store, it asks for
the epochs twice a second, and does without its memory, too, when it has had no answer for longer
than STALE_S. So a flush holds everywhere within a second, and costs requests nothing. Equal
requests share a generation all the same: what is being generated now is not old.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from packhorse.serve.cache import key as keys
from packhorse.serve.cache.base import Amount, DirectLookup, Lookup, Render, Store, StoreError
from packhorse.serve.cache.circuit_breaker import CircuitBreaker
from packhorse.serve.cache.codec import Result, decode, encode, seal, unseal
from packhorse.serve.cache.invalidation import Epochs
from packhorse.serve.cache.key import EVERYTHING, Key
from packhorse.serve.cache.lookup import CacheLookup
from packhorse.serve.cache.memory import MemoryTier
from packhorse.serve.cache.render_cache import Known, Prompts
from packhorse.serve.cache.single_flight import Flight, Flights
from packhorse.serve.errors import Unavailable
from packhorse.serve.messages import Chunk, GenerateRequest, Prompt, Route
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.request_context import RequestContext
from packhorse.serve.tenancy import Tenancy

logger = logging.getLogger("packhorse.cache")

LOOK_EVERY_S = 0.4
STALE_S = 1.0


class ResultCache:
    """What was answered, and what is being answered."""

    def __init__(
        self,
        secret: bytes,
        *,
        memory_bytes: int,
        max_entry_bytes: int,
        ttl_s: float,
        store: Store | None = None,
        clock: Callable[[], float] = time.time,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`clock` gives Unix time in seconds."""
        self.fingerprint = b""
        """The model's and its engine's; set when there is an engine, again with each new one."""
        self._samples: bytes | None = None
        """The fingerprint of the engine that is known to sample where a request says nothing."""
        self.metrics = metrics or ModelMetrics()
        self._secret = secret
        self._clock = clock
        self._ttl_s = ttl_s
        self._max_entry_bytes = max_entry_bytes
        self._tenancy = Tenancy(secret)
        self._epochs = Epochs(clock=clock)
        self._memory = MemoryTier(memory_bytes, metrics=self.metrics)
        self._prompts = Prompts()
        self._flights = Flights()
        self._store = store
        self._breaker = CircuitBreaker(store.name, metrics=self.metrics) if store else None
        self._known_until_s = 0.0  # monotonic; until then every flush of before is known
        self._puts: set[asyncio.Task[None]] = set()

    @property
    def shared_store(self) -> tuple[Store, CircuitBreaker] | None:
        """The store that replicas share, for others who keep something there; the cache closes it.
        None: there is none.
        """
        if self._store is None or self._breaker is None:
            return None
        return self._store, self._breaker

    # What requests ask

    async def look_up(self, context: RequestContext, render: Render) -> Lookup:
        if not self.concerns(context.request):
            return DirectLookup(await render(for_engine=True))
        lookup = CacheLookup(self, context, render)
        await lookup.find()
        return lookup

    # What a look-up asks

    def concerns(self, request: GenerateRequest) -> bool:
        mode = request.cache.mode
        if mode == "always":
            return True
        if keys.leaves_sampling_open(request) and self._samples == self.fingerprint:
            return False  # without the price of a key, which most clients' requests would pay
        return mode != "off" and keys.may_be_repeatable(request)

    def known(self, request: GenerateRequest) -> Known | None:
        return self._prompts.get(request, self.fingerprint)

    def learn(self, request: GenerateRequest, prompt: Prompt) -> Known:
        return self._prompts.learn(request, self.fingerprint, prompt)

    def key(self, request: GenerateRequest, route: Route, known: Known) -> Key | None:
        if request.cache.mode != "always" and not keys.is_repeatable(request, known.prompt):
            if keys.leaves_sampling_open(request):
                self._samples = self.fingerprint
            return None
        tenant = request.caller.tenant
        scopes = keys.scopes_of(route, self._tenancy.mark(tenant))
        digest = keys.digest_of(
            route,
            known.content,
            fingerprint=self.fingerprint,
            salt=self._tenancy.prefix_cache_salt(tenant, request.cache_salt),
            epochs=self._epochs.of(scopes),
        )
        return Key(digest, scopes)

    def _knows_flushes(self) -> bool:
        return self._store is None or time.monotonic() < self._known_until_s

    def flight(self, key: Key) -> Flight | None:
        return self._flights.get(key.digest)

    def lead(self, key: Key, *, streams: bool) -> Flight:
        keep = partial(self._keep, key, self.fingerprint)
        return self._flights.lead(key.digest, keep, streams=streams)

    def recall(self, key: Key, request: GenerateRequest) -> Result | None:
        if not self._knows_flushes():
            return None
        content = self._memory.get(key)
        result = decode(content) if content is not None else None
        return self._fresh(result, request, "memory")

    @property
    def has_store(self) -> bool:
        breaker = self._breaker
        return breaker is not None and not breaker.is_open and self._knows_flushes()

    async def fetch(self, key: Key, request: GenerateRequest) -> Result | None:
        store, breaker = self._store, self._breaker
        if store is None or breaker is None or breaker.is_open:
            return None
        try:
            value = await store.get(key)
        except StoreError as error:
            breaker.failed(error.reason)
            self.metrics.cache_lookups.labels("store", "failed").inc()
            return None
        breaker.worked()
        if value is None:
            return self._fresh(None, request, "store")
        content = unseal(value, key.digest, self._secret)
        if content is None:
            self.metrics.cache_lookups.labels("store", "damaged").inc()
            return None
        result = self._fresh(decode(content), request, "store")
        if result is not None:
            self._memory.put(key, content, self._left_s(result))
        return result

    def _fresh(self, result: Result | None, request: GenerateRequest, tier: str) -> Result | None:
        outcome = "hit"
        if result is None:
            outcome = "miss"
        else:
            max_age_s = request.cache.max_age_s
            limit_s = self._ttl_s if max_age_s is None else min(max_age_s, self._ttl_s)
            if self._clock() - result.created_s > limit_s:
                result, outcome = None, "old"
        self.metrics.cache_lookups.labels(tier, outcome).inc()
        return result

    def _left_s(self, result: Result) -> float:
        return self._ttl_s - (self._clock() - result.created_s)

    def _keep(self, key: Key, fingerprint: bytes, whole: tuple[Chunk, ...] | None) -> None:
        """A flight has ended."""
        if whole is None or fingerprint != self.fingerprint:  # replayed on a new engine, perhaps
            return
        try:
            content = encode(Result(whole, self._clock()))
        except ValueError:  # a model may write half a character
            return
        if len(content) > self._max_entry_bytes:
            self.metrics.cache_stores.labels("too_large").inc()
            return
        self._memory.put(key, content, self._ttl_s)
        self.metrics.cache_stores.labels("kept").inc()
        if self.has_store:
            put = asyncio.create_task(self._put(key, content))
            self._puts.add(put)
            put.add_done_callback(self._puts.discard)

    async def _put(self, key: Key, content: bytes) -> None:
        assert self._store is not None
        assert self._breaker is not None
        try:
            await self._store.put(key, seal(content, key.digest, self._secret), self._ttl_s)
        except StoreError as error:
            self.metrics.cache_stores.labels("failed").inc()
            # A full store still answers: "error" alone says nothing about the next look-up.
            if error.reason != "error":
                self._breaker.failed(error.reason)

    # What operators ask

    def tenant_scope(self, tenant: str) -> str:
        return keys.tenant_scope(self._tenancy.mark(tenant))

    async def flush(self, scope: str) -> Amount:
        entries, size = self._memory.amount(scope)
        self._epochs.bump(scope)
        self._memory.drop(scope)
        self.metrics.cache_flushes.inc()
        if self._store is not None and not await self._look():
            raise Unavailable(
                f"Flushed here, but {self._store.name} cannot be told: other replicas may still "
                "give out what they have, and so may this one after a restart. Ask again when it "
                "is back.",
                retry_after_s=5,
            )
        # After the flush, which is not to wait for it: flushed values stay where they are.
        return Amount(entries, size, await self._in_store(scope))

    async def amount(self, scope: str) -> Amount:
        entries, size = self._memory.amount(scope)
        return Amount(entries, size, await self._in_store(scope))

    async def _in_store(self, scope: str) -> int | None:
        if self._store is None:
            return None
        try:
            return await self._store.count(scope)
        except StoreError as error:
            logger.warning("%s cannot count: %s", self._store.name, error)
            return None

    # The shared store's epochs

    async def start(self) -> None:
        """Ask the store once, so that the first requests find it open."""
        if self._store is not None and not await self._look():
            logger.warning("%s does not answer; the server starts without", self._store.name)

    async def watch(self) -> None:
        """Keep the epochs, and the breaker, up to date; returns at once without a store."""
        while self._store is not None:
            await self._look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self) -> bool:
        """Exchange epochs with the store. False when it does not answer."""
        assert self._store is not None
        assert self._breaker is not None
        asked_s = time.monotonic()
        try:
            theirs = await self._store.merge_epochs(self._epochs.seen)
            if EVERYTHING not in theirs and EVERYTHING not in self._epochs.seen:
                self._epochs.bump(EVERYTHING)
                theirs = await self._store.merge_epochs(self._epochs.seen)
        except StoreError as error:
            self._breaker.failed(error.reason)
            self._breaker.open(str(error))
            return False
        if self._epochs.merge(theirs):
            self._memory.drop(EVERYTHING)
        self._known_until_s = max(self._known_until_s, asked_s + STALE_S)
        self._breaker.close()
        return True

    async def close(self) -> None:
        for put in self._puts:
            put.cancel()
        if self._store is not None:
            await self._store.close()
