"""The shared store in Redis, Valkey, or another server with Redis' protocol.

A server that answers MOVED is a node of a cluster: from then on a cluster client is used, which
asks the node that has the key.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from packhorse.serve.cache.base import StoreError
from packhorse.serve.cache.invalidation import validate_epochs
from packhorse.serve.cache.key import EVERYTHING, Key
from packhorse.serve.cache.store_keys import epochs_key, store_key, store_key_pattern

logger = logging.getLogger("packhorse.cache")

Reply = TypeVar("Reply")
Client = Any  # Redis or RedisCluster, which have no common type

MAX_CONNECTIONS = 64
# SCAN calls and keys per call for an estimate: the server may have millions of foreign keys.
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


class _Moving(StoreError):
    """The cluster is migrating the key's slot. redis-py sends ASKING on one connection and the
    command on another, so the key cannot be reached meanwhile; this is no failure of the store.
    """

    def __init__(self) -> None:
        super().__init__("error", "the key is on its way from one node to another")


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
        self._url = url
        self._cluster: RedisCluster | None = None
        self._cannot_follow: str | None = None
        self._was_partly_away = False
        self._places = asyncio.Semaphore(
            MAX_CONNECTIONS
        )  # the cluster client's pools fail instead of waiting
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # no retries: the engine can answer
        )
        self._client: Redis = Redis.from_pool(pool)

    async def get(self, key: Key) -> bytes | None:
        name = store_key(self._prefix, key)
        try:
            reply = await self._asked(lambda client: client.get(name))
        except _Moving:
            return None
        if reply is not None and not isinstance(reply, bytes):
            raise StoreError("error", "the reply is no value")
        return reply

    async def put(self, key: Key, value: bytes, ttl_s: float) -> None:
        name, ttl_ms = store_key(self._prefix, key), max(1, int(ttl_s * 1000))
        with contextlib.suppress(_Moving):
            await self._asked(lambda client: client.set(name, value, px=ttl_ms))

    async def merge_epochs(self, seen: Mapping[str, str]) -> dict[str, str]:
        if self._was_partly_away:
            await self._all_masters()
        arguments = [text for pair in seen.items() for text in pair]
        name = epochs_key(self._prefix)
        reply = await self._asked(lambda client: client.eval(_MERGE, 1, name, *arguments))
        if not isinstance(reply, list) or len(reply) % 2:
            raise StoreError("error", "the reply is no list of epochs")
        try:
            texts = [text.decode() for text in reply]
            return validate_epochs(dict(zip(texts[::2], texts[1::2], strict=True)))
        except (AttributeError, ValueError) as error:
            raise StoreError("error", "the reply is no list of epochs") from error

    async def _all_masters(self) -> None:
        """Check every master of a cluster. Raises StoreError while one does not answer: the node
        with the epochs may be another one, and the store would seem to come and go with every poll.
        """
        if self._cluster is not None:
            every = RedisCluster.PRIMARIES
            await self._asked(lambda client: client.ping(target_nodes=every))
        self._was_partly_away = False

    async def count(self, scope: str) -> int | None:
        """Scans some of the keys and extrapolates to the number of all keys."""
        pattern = store_key_pattern(self._prefix, None if scope == EVERYTHING else scope)
        if self._cluster is None:
            return await self._count_on({}, pattern)
        masters = self._cluster.get_primaries()
        return sum([await self._count_on({"target_nodes": node}, pattern) for node in masters])

    async def _count_on(self, node: dict[str, Any], pattern: re.Pattern[str]) -> int:
        total: int = await self._asked(lambda client: client.dbsize(**node))
        asked = {"match": f"{self._prefix}:*", "count": KEYS_A_LOOK, **node}
        cursor, found = 0, 0
        for _ in range(LOOKS):
            cursor, names = await self._asked(partial(_scan, at=cursor, asked=asked))
            if isinstance(cursor, dict):  # a cluster's, by node
                (cursor,) = cursor.values()
            found += sum(bool(pattern.fullmatch(_text(name))) for name in names)
            if not cursor:
                return found
        return round(found * max(1.0, total / (LOOKS * KEYS_A_LOOK)))

    async def close(self) -> None:
        await self._client.aclose()
        if self._cluster is not None:
            await self._cluster.aclose()

    async def _asked(self, ask: Callable[[Client], Awaitable[Any]]) -> Any:
        """Raises StoreError."""
        if self._cannot_follow is not None:
            raise StoreError("error", self._cannot_follow)
        try:
            # One limit for the whole call: the client's own are for connect, write and read each.
            async with asyncio.timeout(self._timeout_s):
                if self._cluster is None:
                    try:
                        return await _cancellable(ask(self._client))
                    except exceptions.AskError:  # MovedError is a subclass
                        self._follow()
                async with self._places:
                    return await _cancellable(self._of_cluster(ask))
        except (TimeoutError, exceptions.TimeoutError) as error:
            self._was_partly_away = True
            raise StoreError("timeout", f"no answer within {self._timeout_s:g} s") from error
        except (exceptions.ConnectionError, exceptions.RedisClusterException, OSError) as error:
            # Also from a server that is loading its data, or refuses the password.
            self._was_partly_away = True
            raise StoreError("refused", str(error)) from error
        except exceptions.RedisError as error:
            if type(error) is exceptions.ClusterError:  # redirected too often
                raise _Moving from error
            raise StoreError("error", str(error)) from error
        except StoreError:
            raise
        except Exception as error:  # redis-py's parser, on an answer that is not Redis'
            raise StoreError("error", f"{type(error).__name__}: {error}") from error

    async def _of_cluster(self, ask: Callable[[Client], Awaitable[Any]]) -> Any:
        assert self._cluster is not None
        # The client would otherwise choose a node before it knows the cluster.
        await self._cluster.initialize()
        return await ask(self._cluster)

    def _follow(self) -> None:
        """Switch to a cluster client. Raises StoreError."""
        if self._cluster is not None:
            return
        try:
            self._cluster = RedisCluster.from_url(
                self._url,
                max_connections=MAX_CONNECTIONS,
                socket_timeout=self._timeout_s,
                # Below the whole time limit, so that after an unreachable node others can be tried.
                socket_connect_timeout=self._timeout_s / 3,
                require_full_coverage=False,
                # Update only the moved slot: a full update would close connections in use.
                reinitialize_steps=0,
                retry=Retry(NoBackoff(), 0),
            )
        except (exceptions.RedisClusterException, ValueError) as error:
            self._cannot_follow = (
                f"{self.name} is a Redis Cluster, which needs another URL: {error}"
            )
            raise StoreError("error", self._cannot_follow) from None
        logger.info("%s is a Redis Cluster: all of its nodes are asked", self.name)


def _scan(client: Client, *, at: int, asked: dict[str, Any]) -> Awaitable[Any]:
    reply: Awaitable[Any] = client.scan(at, **asked)
    return reply


async def _cancellable(reply: Awaitable[Reply]) -> Reply:
    """The reply, or CancelledError if the task was cancelled meanwhile. redis-py may lose it: it
    sends with asyncio.wait_for, which before Python 3.12 drops a cancellation that comes just as
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
