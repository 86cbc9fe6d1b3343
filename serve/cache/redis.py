"""Results in Redis, shared by replicas; also Valkey, and whatever else speaks its protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from serve.cache.base import StoreError
from serve.cache.epochs import checked
from serve.cache.key import EVERYTHING, Key
from serve.cache.names import name_of, pattern_of

Reply = TypeVar("Reply")

MAX_CONNECTIONS = 64
# Keys looked at for an estimate: others may have millions in the same server.
LOOKS, KEYS_A_LOOK = 20, 1000

# KEYS[1]: a hash of scope -> epoch. ARGV: scope, epoch, ... Redis runs a script in one step.
_MERGE = """
for i = 1, #ARGV, 2 do
    local held = redis.call('HGET', KEYS[1], ARGV[i])
    if not held or held < ARGV[i + 1] then
        redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
    end
end
return redis.call('HGETALL', KEYS[1])
"""


class RedisStore:
    """Satisfies the Store protocol."""

    def __init__(self, url: str, prefix: str, timeout_s: float) -> None:
        """`url` is redis://, rediss:// (TLS) or unix://, with user and password if any. Raises
        ValueError.
        """
        place = urlsplit(url)
        self.name = f"{place.scheme}://{place.hostname or ''}:{place.port or 6379}"
        self._prefix = prefix
        self._timeout_s = timeout_s
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # the engine has the answer, too
        )
        self._client: Redis = Redis.from_pool(pool)

    async def get(self, key: Key) -> bytes | None:
        reply = await self._asked(self._client.get(name_of(self._prefix, key)))
        if reply is not None and not isinstance(reply, bytes):
            raise StoreError("error", "the reply is no value")
        return reply

    async def put(self, key: Key, value: bytes, ttl_s: float) -> None:
        name = name_of(self._prefix, key)
        await self._asked(self._client.set(name, value, px=max(1, int(ttl_s * 1000))))

    async def merge_epochs(self, seen: Mapping[str, str]) -> dict[str, str]:
        arguments = [text for pair in seen.items() for text in pair]
        asked = self._client.eval(_MERGE, 1, f"{self._prefix}:epochs", *arguments)
        reply = await self._asked(asked)
        if not isinstance(reply, list) or len(reply) % 2:
            raise StoreError("error", "the reply is no list of epochs")
        try:
            texts = [text.decode() for text in reply]
            return checked(dict(zip(texts[::2], texts[1::2], strict=True)))
        except (AttributeError, ValueError) as error:
            raise StoreError("error", "the reply is no list of epochs") from error

    async def count(self, scope: str) -> int | None:
        """Looks at some of the keys, and estimates the rest from how many there are."""
        total = await self._asked(self._client.dbsize())
        pattern = pattern_of(self._prefix, None if scope == EVERYTHING else scope)
        cursor, found = 0, 0
        for _ in range(LOOKS):
            scanned = self._client.scan(cursor, match=f"{self._prefix}:*", count=KEYS_A_LOOK)
            cursor, names = await self._asked(scanned)
            found += sum(bool(pattern.fullmatch(_text(name))) for name in names)
            if not cursor:
                return found
        return round(found * max(1.0, total / (LOOKS * KEYS_A_LOOK)))

    async def close(self) -> None:
        await self._client.aclose()

    async def _asked(self, reply: Awaitable[Reply]) -> Reply:
        """Raises StoreError."""
        try:
            # Over all: the client's own limits are for each of connecting, writing and reading.
            async with asyncio.timeout(self._timeout_s):
                return await _cancellable(reply)
        except (TimeoutError, exceptions.TimeoutError) as error:
            raise StoreError("timeout", f"no answer within {self._timeout_s:g} s") from error
        except (exceptions.ConnectionError, OSError) as error:
            # Also of a server that is loading, or wants another password.
            raise StoreError("refused", str(error)) from error
        except exceptions.RedisError as error:
            raise StoreError("error", str(error)) from error
        except Exception as error:  # what its parser makes of an answer that is not Redis'
            raise StoreError("error", f"{type(error).__name__}: {error}") from error


async def _cancellable(reply: Awaitable[Reply]) -> Reply:
    """The reply, or CancelledError if the task was cancelled meanwhile. The client may forget that:
    it sends with asyncio.wait_for, which before Python 3.12 drops a cancellation that comes just as
    the sending is done (https://github.com/python/cpython/issues/86296).
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        return await reply
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


def _text(name: bytes | str) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
