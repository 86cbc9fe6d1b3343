"""The tier in this process: the results used last, bounded in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import LRUCache
from packhorse.serve import metrics
from packhorse.serve.cache.key import Key

# Python's own objects around an entry.
OVERHEAD_BYTES = 500


@dataclass(frozen=True, slots=True)
class Entry:
    key: Key
    content: bytes
    expires_s: float


class _Entries(LRUCache[bytes, Entry]):
    def popitem(self) -> tuple[bytes, Entry]:
        """Called to make room."""
        metrics.CACHE_EVICTIONS.inc()
        return super().popitem()


class Memory:
    """Least recently used go first. 0 bytes: holds nothing."""

    def __init__(self, max_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries = _Entries(max_bytes, getsizeof=_size)
        metrics.CACHE_ENTRIES.set_function(lambda: len(self._entries))
        metrics.CACHE_BYTES.set_function(lambda: self._entries.currsize)

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
        """Free what a flush has made void: nothing would look it up any more."""
        for entry in self._of(scope):
            del self._entries[entry.key.digest]

    def amount(self, scope: str) -> tuple[int, int]:
        """Entries and bytes."""
        entries = self._of(scope)
        return len(entries), sum(map(_size, entries))

    def _of(self, scope: str) -> list[Entry]:
        # Iterating does not count as use.
        return [entry for _, entry in self._entries.items() if scope in entry.key.scopes]


def _size(entry: Entry) -> int:
    return len(entry.content) + OVERHEAD_BYTES
