"""Results in Memcached, shared by replicas."""

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
from packhorse.serve.cache.invalidation import checked
from packhorse.serve.cache.key import Key
from packhorse.serve.cache.store_keys import name_of

Reply = TypeVar("Reply")

CONNECTIONS, MAX_CONNECTIONS = 8, 64  # aiomcache opens so many, and more only to replace some
MAX_TRIES = 100  # at epochs that another replica changes at the same time
MAX_RELATIVE_S = 30 * 24 * 3600  # Memcached takes more for a date


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
        name = name_of(self._prefix, key).encode()
        return await self._asked(lambda client: client.get(name))

    async def put(self, key: Key, value: bytes, ttl_s: float) -> None:
        name, ttl = name_of(self._prefix, key).encode(), min(max(1, int(ttl_s)), MAX_RELATIVE_S)
        if not await self._asked(lambda client: client.set(name, value, ttl)):
            raise StoreError("error", "the value was not taken")

    async def merge_epochs(self, seen: Mapping[str, str]) -> dict[str, str]:
        name = f"{self._prefix}:epochs".encode()
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
        return None  # it lists no keys

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
        except Exception as error:  # what its parser makes of an answer that is not Memcached's
            raise StoreError("error", f"{type(error).__name__}: {error}") from error


class _Client(Client):
    """aiomcache's, mended in two places that all commands pass.

    What is interrupted leaves its answer on the connection, for the next to take for its own: here
    such a connection is closed. And a server that hangs up in the middle of an answer would have
    the original read nothing again and again, without ever letting the event loop go on.
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
        # The pool closes what has an exception.
        conn.reader.set_exception(ConnectionError("interrupted"))
        raise


async def _swap(name: bytes, value: bytes, token: int | None, client: Client) -> bool:
    if token is None:
        return bool(await client.add(name, value))
    return bool(await client.cas(name, value, token))


def _epochs_from(held: bytes | None) -> dict[str, str]:
    """Raises StoreError for what is none of ours."""
    try:
        return checked(json.loads(held)) if held is not None else {}
    except ValueError as error:
        raise StoreError("error", "the epochs cannot be read") from error
