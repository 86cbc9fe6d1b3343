"""Servers without keys, and ways to call them that no client library has."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from packhorse.serve.api.admin import Admin
from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.settings.auth import AuthSettings
from tests.integration.serving import Served, serving


@asynccontextmanager
async def keyless(**options: Any) -> AsyncIterator[Served]:
    """A server as it starts without any keys."""
    without_keys = options.pop("without_keys", None)
    auth = AuthSettings(without_keys=without_keys) if without_keys else AuthSettings()
    cache = ResultCache(b"s" * 32, memory_bytes=2**20, max_entry_bytes=2**16, ttl_s=60)
    async with serving(keys=auth, admin=Admin(cache=cache, model="echo"), **options) as server:
        yield server


def own_address() -> str:
    """An address of this machine that is not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = str(probe.getsockname()[0])
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    return address


async def raw(address: tuple[str, int], *lines: str) -> bytes:
    """Send a request as it is written, and read until the server hangs up."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write("\r\n".join([*lines, "connection: close", "", ""]).encode())
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])
