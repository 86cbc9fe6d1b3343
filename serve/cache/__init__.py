"""The result cache. Stores by the scheme of their URL; each imports its client when it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packhorse.serve.cache.base import Store


def _redis(url: str, prefix: str, timeout_s: float) -> Store:
    from packhorse.serve.cache.redis import RedisStore

    return RedisStore(url, prefix, timeout_s)


def _memcached(url: str, prefix: str, timeout_s: float) -> Store:
    from packhorse.serve.cache.memcached import MemcachedStore

    return MemcachedStore(url, prefix, timeout_s)


STORES: dict[str, Callable[[str, str, float], Store]] = {
    "redis": _redis,
    "rediss": _redis,
    "unix": _redis,
    "memcached": _memcached,
}
