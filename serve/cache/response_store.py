"""Where responses are kept for the Responses API: in memory, or in the result cache's shared store.

Apart from results: keys are of a form that results do not have, and a flush of results leaves
responses alone. A tenant's responses are found by that tenant only, in memory by its name and in a
shared store by a key that is made from its mark.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from packhorse.serve.cache.base import Store, StoreError
from packhorse.serve.cache.circuit_breaker import CircuitBreaker
from packhorse.serve.cache.codec import seal, unseal
from packhorse.serve.cache.key import EVERYTHING, Key
from packhorse.serve.errors import Unavailable
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.tenancy import Tenancy

# An estimate for the Python objects of one entry.
OVERHEAD_BYTES = 500
# Larger contents are compressed in a thread.
IN_THREAD_ABOVE_BYTES = 2**16
GONE = b""
"""Stands in a shared store in the place of a deleted response, which Memcached and other replicas
would otherwise still have.
"""
CLOSE_WITHIN_S = 5.0


class _Entry(NamedTuple):
    content: bytes
    expires_s: float


class MemoryResponses:
    """Satisfies the protocol ResponseStore. When it is full, the tenant that holds most loses its
    oldest response: nobody's responses push out those of others.
    """

    def __init__(
        self,
        *,
        max_entries: int,
        max_bytes: int,
        max_entry_bytes: int,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        metrics: ServerMetrics | None = None,
    ) -> None:
        """`clock` gives seconds."""
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._max_entry_bytes = min(max_entry_bytes, max_bytes)
        self._ttl_s = ttl_s
        self._clock = clock
        self._of_tenant: dict[str, OrderedDict[str, _Entry]] = {}
        self._bytes_of: dict[str, int] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self.entries = 0
        self.bytes = 0
        metrics = metrics or ServerMetrics()
        self._dropped = metrics.responses_dropped
        metrics.responses_kept.set_function(lambda: self.entries)
        metrics.responses_kept_bytes.set_function(lambda: self.bytes)

    def fits(self, size: int) -> bool:
        return self._max_entries > 0 and size + OVERHEAD_BYTES <= self._max_entry_bytes

    def put(self, tenant: str, response_id: str, content: bytes) -> None:
        self.drop(tenant, response_id)
        if not self.fits(len(content)):
            self._dropped.labels("too_large").inc()
            return
        self._drop_old()
        size = len(content) + OVERHEAD_BYTES
        while self.entries >= self._max_entries or self.bytes + size > self._max_bytes:
            if self.entries >= self._max_entries:
                largest = max(self._of_tenant, key=lambda each: len(self._of_tenant[each]))
            else:
                largest = max(self._bytes_of, key=self._bytes_of.__getitem__)
            self.drop(largest, next(iter(self._of_tenant[largest])))
            self._dropped.labels("evicted").inc()
        entry = _Entry(content, self._clock() + self._ttl_s)
        self._of_tenant.setdefault(tenant, OrderedDict())[response_id] = entry
        self._bytes_of[tenant] = self._bytes_of.get(tenant, 0) + size
        self.entries += 1
        self.bytes += size
        self._sweep_later()

    def peek(self, tenant: str, response_id: str) -> bytes | None:
        """What `get` gives, at once."""
        entries = self._of_tenant.get(tenant)
        entry = entries.get(response_id) if entries is not None else None
        if entry is None or entry.expires_s <= self._clock():
            return None
        return entry.content

    async def get(self, tenant: str, response_id: str) -> bytes | None:
        return self.peek(tenant, response_id)

    async def delete(self, tenant: str, response_id: str) -> None:
        self.drop(tenant, response_id)

    def drop(self, tenant: str, response_id: str) -> None:
        """What `delete` does, at once."""
        entries = self._of_tenant.get(tenant, OrderedDict())
        entry = entries.pop(response_id, None)
        if entry is None:
            return
        size = len(entry.content) + OVERHEAD_BYTES
        self.entries -= 1
        self.bytes -= size
        self._bytes_of[tenant] -= size
        if not entries:
            del self._of_tenant[tenant], self._bytes_of[tenant]

    async def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()

    def _sweep_later(self) -> None:
        if self._sweep is None:
            loop = asyncio.get_running_loop()
            self._sweep = loop.call_later(self._ttl_s, self._swept)

    def _swept(self) -> None:
        self._sweep = None
        self._drop_old()
        if self.entries:
            self._sweep_later()

    def _drop_old(self) -> None:
        """Each tenant's entries are in the order in which they expire."""
        now_s = self._clock()
        for tenant, entries in list(self._of_tenant.items()):
            for response_id, entry in list(entries.items()):
                if entry.expires_s > now_s:
                    break
                self.drop(tenant, response_id)


class SharedResponses:
    """Satisfies the protocol ResponseStore, over a store that replicas share.

    What is kept is in memory until it is written, and stays there when the shared store fails: this
    replica alone has it then. Everything else is read from the shared store, each time: another
    replica may have changed or deleted it.
    """

    def __init__(
        self,
        memory: MemoryResponses,
        store: Store,
        breaker: CircuitBreaker,
        *,
        secret: bytes,
        ttl_s: float,
    ) -> None:
        self._memory = memory
        self._store = store
        self._breaker = breaker
        self._secret = secret
        self._tenancy = Tenancy(secret)
        self._ttl_s = ttl_s
        self._writing: dict[tuple[str, str], asyncio.Task[None]] = {}

    def fits(self, size: int) -> bool:
        return self._memory.fits(size)

    def put(self, tenant: str, response_id: str, content: bytes) -> None:
        self._memory.put(tenant, response_id, content)
        if not self._breaker.is_open:
            self._write_soon(tenant, response_id)

    async def get(self, tenant: str, response_id: str) -> bytes | None:
        content = self._memory.peek(tenant, response_id)
        if content is not None:
            return content or None
        key = self._key(tenant, response_id)
        if self._breaker.is_open:
            raise self._unavailable()
        try:
            value = await self._store.get(key)
        except StoreError as error:
            self._breaker.failed(error.reason)
            raise self._unavailable() from error
        self._breaker.worked()
        if value is None:
            return None
        return unseal(value, key.digest, self._secret) or None

    async def delete(self, tenant: str, response_id: str) -> None:
        self._memory.put(tenant, response_id, GONE)
        if not self._breaker.is_open:
            await asyncio.shield(self._write_soon(tenant, response_id))
        if self._memory.peek(tenant, response_id) is GONE:  # it could not be written
            self._memory.drop(tenant, response_id)  # or a second try would find nothing to delete
            raise self._unavailable()

    async def close(self) -> None:
        if self._writing:
            await asyncio.wait(list(self._writing.values()), timeout=CLOSE_WITHIN_S)
        for task in list(self._writing.values()):
            task.cancel()
        await self._memory.close()

    def _write_soon(self, tenant: str, response_id: str) -> asyncio.Task[None]:
        """One task for each response writes what memory has of it: never two in a wrong order."""
        place = (tenant, response_id)
        task = self._writing.get(place)
        if task is None:
            task = self._writing[place] = asyncio.create_task(self._write(tenant, response_id))
            task.add_done_callback(lambda _: self._writing.pop(place, None))
        return task

    async def _write(self, tenant: str, response_id: str) -> None:
        key = self._key(tenant, response_id)
        while (content := self._memory.peek(tenant, response_id)) is not None:
            if len(content) > IN_THREAD_ABOVE_BYTES:
                value = await asyncio.to_thread(seal, content, key.digest, self._secret)
            else:
                value = seal(content, key.digest, self._secret)
            try:
                await self._store.put(key, value, self._ttl_s)
            except StoreError as error:
                if error.reason != "error":  # a full store still answers
                    self._breaker.failed(error.reason)
                return
            if self._memory.peek(tenant, response_id) is content:
                self._memory.drop(tenant, response_id)
                return

    def _key(self, tenant: str, response_id: str) -> Key:
        made = hashlib.blake2b(b"packhorse-response-1\0", digest_size=32)
        made.update(self._tenancy.mark(tenant))
        made.update(response_id.encode(errors="replace"))
        return Key(made.digest(), (EVERYTHING, "responses"))

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            "The store of responses does not answer; try again soon, or send the whole "
            "conversation as input.",
            retry_after_s=2,
        )
