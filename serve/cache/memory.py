"""The memory tier of the result cache: an LRU cache in this process, bounded in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache

from packhorse.serve.cache.key import Key
from packhorse.serve.metrics import ModelMetrics

# An estimate for the Python objects of one entry.
OVERHEAD_BYTES = 500


@dataclass(frozen=True, slots=True)
class Entry:
    key: Key
    content: bytes
    expires_s: float


class _Entries(LRUCache[bytes, Entry]):
    def __init__(self, max_bytes: int, metrics: ModelMetrics) -> None:
        super().__init__(max_bytes, getsizeof=_size)
        self._metrics = metrics

    def popitem(self) -> tuple[bytes, Entry]:
        """Called to make room."""
        self._metrics.cache_evictions.inc()
        return super().popitem()


class MemoryTier:
    """Evicts the least recently used results. With 0 bytes it holds none."""

    def __init__(
        self,
        max_bytes: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        metrics = metrics or ModelMetrics()
        self._entries = _Entries(max_bytes, metrics)
        metrics.cache_entries.set_function(lambda: len(self._entries))
        metrics.cache_bytes.set_function(lambda: self._entries.currsize)

    def get(self, key: Key) -> bytes | None:
        entry = self._entries.get(key.digest)
        if entry is None:
            return None
        if entry.expires_s <= self._clock():
            del self._entries[key.digest]
            return None
        return entry.content

    def put(self, key: Key, content: bytes, ttl_s: float) -> None:
        entry = Entry(key, content, self._clock() + ttl_s)
        if _size(entry) <= self._entries.maxsize:
            self._entries[key.digest] = entry

    def drop(self, scope: str) -> None:
        """Free the results of a flushed scope: their keys are not looked up any more."""
        for entry in self._of(scope):
            del self._entries[entry.key.digest]

    def amount(self, scope: str) -> tuple[int, int]:
        """The scope's number of entries, and their bytes."""
        entries = self._of(scope)
        return len(entries), sum(map(_size, entries))

    def _of(self, scope: str) -> list[Entry]:
        # Iterating does not change the LRU order.
        return [entry for _, entry in self._entries.items() if scope in entry.key.scopes]


def _size(entry: Entry) -> int:
    return len(entry.content) + OVERHEAD_BYTES
