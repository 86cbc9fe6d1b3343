"""A server with a result cache over the echo engine, and what it says of its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from packhorse.serve.api.admin import Admin
from packhorse.serve.cache.result_cache import ResultCache
from tests.client import CHAT, hello
from tests.integration.serving import Served, serving

MARK = "x-packhorse-cache"


def a_cache(**options: Any) -> ResultCache:
    known: dict[str, Any] = {"memory_bytes": 2**24, "max_entry_bytes": 2**16, "ttl_s": 600.0}
    cache = ResultCache(b"s" * 32, **{**known, **options})
    cache.fingerprint = b"model"
    return cache


@asynccontextmanager
async def caching(**options: Any) -> AsyncIterator[Served]:
    cache = a_cache()
    async with serving(cache=cache, admin=Admin(cache=cache, model="echo"), **options) as served:
        yield served


def greedy(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return hello(text, temperature=0, **fields)


async def mark(served: Served, body: dict[str, Any], **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = await served.http.post(CHAT, json=body, headers=named)
    assert response.status_code == 200, response.text
    return response.headers[MARK]
