"""Responses in a store that replicas share, against real Redis and Memcached servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis as redis_client

from packhorse.serve.cache.response_store import MemoryResponses, SharedResponses
from packhorse.serve.errors import Unavailable
from tests.integration.serving import serving, until
from tests.integration.test_responses import URL, created, hello
from tests.integration.test_stores import SECRET, cache_at
from tests.stores import StoreServer, running_store

LARGE = bytes(range(256)) * 2000


@pytest.fixture(params=["redis", "memcached"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    with running_store(request.param, tmp_path) as running:
        yield running


@asynccontextmanager
async def replica(
    url: str, secret: bytes = SECRET, timeout_s: float = 20.0
) -> AsyncIterator[SharedResponses]:
    async with cache_at(url, timeout_s=timeout_s) as cache:
        memory = MemoryResponses(max_entries=100, max_bytes=2**24, max_entry_bytes=2**21, ttl_s=60)
        shared = cache.shared_store
        assert shared is not None
        kept = SharedResponses(memory, *shared, secret=secret, ttl_s=60)
        yield kept
        await kept.close()


async def written(kept: SharedResponses) -> None:
    await until(lambda: not kept._writing)


async def test_replicas_share_responses(server: StoreServer) -> None:
    async with replica(server.url) as one, replica(server.url) as two:
        for content in (b"small", LARGE):
            one.put("a", "resp_1", content)
            assert await one.get("a", "resp_1") == content, "at once"
            await written(one)
            assert one._memory.entries == 0, "what is written is not held"
            assert await one.get("a", "resp_1") == content
            assert await two.get("a", "resp_1") == content
        assert await two.get("b", "resp_1") is None, "another tenant's"
        await two.delete("a", "resp_1")
        assert await one.get("a", "resp_1") is None
        assert await two.get("a", "resp_1") is None
        one.put("a", "resp_2", b"1")
        for number in range(20):
            one.put("a", "resp_2", b"%d" % number)
        await written(one)
        assert await two.get("a", "resp_2") == b"19", "the last one wins"
    async with replica(server.url, secret=b"t" * 32) as other:
        assert await other.get("a", "resp_2") is None


async def test_keys_and_flushes_of_results_leave_them_alone(tmp_path: Path) -> None:
    with running_store("redis", tmp_path) as server:
        async with cache_at(server.url) as cache, replica(server.url) as kept:
            kept.put("a", "resp_1", b"one")
            await written(kept)
            names = redis_client.Redis(port=server.port, decode_responses=True).keys("*")
            assert not any("resp_1" in name or ":a:" in name for name in names)
            assert (await cache.amount("all")).store_entries == 0
            await cache.flush("all")
            assert await kept.get("a", "resp_1") == b"one"


async def test_what_was_changed_in_the_store_is_not_given_out(tmp_path: Path) -> None:
    with running_store("redis", tmp_path) as server:
        client = redis_client.Redis(port=server.port)
        async with replica(server.url) as kept:
            for response_id in ("resp_1", "resp_2"):
                kept.put("a", response_id, response_id.encode())
                await written(kept)
            one, two = [name for name in client.keys("*") if b"epochs" not in name]
            value = client.get(one)
            assert isinstance(value, bytes)
            client.set(two, value)  # under another key
            client.set(one, value[:-1])
            assert await kept.get("a", "resp_1") is None
            assert await kept.get("a", "resp_2") is None


async def test_without_the_store_a_replica_keeps_its_own(tmp_path: Path) -> None:
    with running_store("redis", tmp_path) as server:
        async with replica(server.url, timeout_s=0.3) as kept:
            kept.put("a", "resp_1", b"one")
            await written(kept)
            server.kill()
            kept.put("a", "resp_2", b"two")
            await asyncio.sleep(0)
            await written(kept)
            assert await kept.get("a", "resp_2") == b"two"
            with pytest.raises(Unavailable):
                await kept.get("a", "resp_1")
            with pytest.raises(Unavailable):
                await kept.delete("a", "resp_2")
            with pytest.raises(Unavailable):  # a second try does not find it gone
                await kept.delete("a", "resp_2")


async def test_a_conversation_goes_on_at_another_replica(server: StoreServer) -> None:
    async with (
        replica(server.url) as one,
        replica(server.url) as two,
        serving(kept=one) as first,
        serving(kept=two) as second,
    ):
        made = await created(first, hello("one", background=True))
        await until(lambda: not first.responses.in_background)
        await written(one)
        found = await second.http.get(f"{URL}/{made['id']}")
        assert found.json()["status"] == "completed"
        more = await created(second, hello("two", previous_response_id=made["id"]))
        items = (await second.http.get(f"{URL}/{more['id']}/input_items?order=asc")).json()
        said = [item["content"][0]["text"] for item in items["data"]]
        assert said == ["one", "one", "two"]
