"""The shared store in Memcached."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiomcache import Client
from aiomcache.exceptions import ClientException
from aiomcache.pool import Connection

from packhorse.serve.cache.base import StoreError
from packhorse.serve.cache.invalidation import validate_epochs
from packhorse.serve.cache.key import Key
from packhorse.serve.cache.store_keys import epochs_key, store_key

Reply = TypeVar("Reply")

CONNECTIONS, MAX_CONNECTIONS = 8, 64  # aiomcache opens 8; more only to replace closed ones
MAX_TRIES = 100  # of compare-and-swap on the epochs, while other replicas change them
MAX_RELATIVE_S = 30 * 24 * 3600  # Memcached takes a longer time-to-live for a date


class MemcachedStore:
    """Satisfies the Store protocol. Epochs are one value, changed by compare-and-swap."""

    def __init__(self, url: str, prefix: str, timeout_s: float) -> None:
        """`url` is memcached://HOST:PORT. Raises ValueError."""
        place = urlsplit(url)
        if not place.hostname or place.path not in ("", "/"):
            raise ValueError("write memcached://HOST:PORT")
        self.name = f"memcached://{place.hostname}:{place.port or 11211}"
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._client = _Client(
            place.hostname, place.port or 11211, pool_size=MAX_CONNECTIONS, pool_minsize=CONNECTIONS
        )

    async def get(self, key: Key) -> bytes | None:
        name = store_key(self._prefix, key).encode()
        return await self._asked(lambda client: client.get(name))

    async def put(self, key: Key, value: bytes, ttl_s: float) -> None:
        name, ttl = store_key(self._prefix, key).encode(), min(max(1, int(ttl_s)), MAX_RELATIVE_S)
        if not await self._asked(lambda client: client.set(name, value, ttl)):
            raise StoreError("error", "the value was not taken")

    async def merge_epochs(self, seen: Mapping[str, str]) -> dict[str, str]:
        name = epochs_key(self._prefix).encode()
        for _ in range(MAX_TRIES):
            held, token = await self._asked(lambda client: client.gets(name))
            epochs = _epochs_from(held)
            merged = {**epochs, **{s: e for s, e in seen.items() if e > epochs.get(s, "")}}
            if merged == epochs:
                return epochs
            value = json.dumps(merged).encode()
            if await self._asked(partial(_swap, name, value, token)):
                return merged
        raise StoreError("error", "the epochs are changed all the time")

    async def count(self, scope: str) -> int | None:
        return None  # Memcached cannot list its keys

    async def close(self) -> None:
        await self._client.close()

    async def _asked(self, ask: Callable[[Client], Awaitable[Reply]]) -> Reply:
        """Raises StoreError."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await ask(self._client)
        except TimeoutError as error:
            raise StoreError("timeout", f"no answer within {self._timeout_s:g} s") from error
        except OSError as error:
            raise StoreError("refused", str(error)) from error
        except ClientException as error:
            raise StoreError("error", str(error)) from error
        except Exception as error:  # aiomcache's parser, on an answer that is not Memcached's
            raise StoreError("error", f"{type(error).__name__}: {error}") from error


class _Client(Client):
    """aiomcache's client with two bugs fixed, in the two methods that all commands use.

    An interrupted command leaves its answer on the connection, where the next command would take it
    for its own; here such a connection is closed. And when the server hangs up in the middle of an
    answer, the original reads nothing in a loop without yielding to the event loop.
    """

    async def _execute_simple_command(self, conn: Connection, raw_command: bytes) -> bytes:
        with _whole(conn):
            conn.writer.write(raw_command)
            await conn.writer.drain()
            line = await conn.reader.readuntil(b"\r\n")
            return line[:-2]

    async def _multi_get(self, conn: Connection, *keys: bytes, **options: Any) -> Any:
        with _whole(conn):
            return await super()._multi_get(conn, *keys, **options)


@contextmanager
def _whole(conn: Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # The pool closes connections whose reader has an exception.
        conn.reader.set_exception(ConnectionError("interrupted"))
        raise


async def _swap(name: bytes, value: bytes, token: int | None, client: Client) -> bool:
    if token is None:
        return bool(await client.add(name, value))
    return bool(await client.cas(name, value, token))


def _epochs_from(held: bytes | None) -> dict[str, str]:
    """The stored epochs. Raises StoreError for an invalid value."""
    try:
        return validate_epochs(json.loads(held)) if held is not None else {}
    except ValueError as error:
        raise StoreError("error", "the epochs cannot be read") from error
