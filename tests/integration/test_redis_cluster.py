"""The shared tier on a Redis Cluster: three masters, of which the settings name one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.cache.base import StoreError
from packhorse.serve.cache.redis import RedisStore
from packhorse.serve.cache.result_cache import ResultCache
from tests.integration.serving import until
from tests.integration.test_stores import cache_at, find, keep, redis_cli, store_at
from tests.stores import StoreServer, running_cluster
from tests.unit.serve.cache.making import key


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StoreServer]]:
    with running_cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture
def cluster(shared: list[StoreServer]) -> list[StoreServer]:
    for server in shared:
        redis_cli(server, "flushall")
    return shared


def failures(*caches: ResultCache) -> float:
    return sum(
        sample.value
        for cache in caches
        for metric in cache.metrics.cache_store_failures.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


@pytest.mark.parametrize("first", range(3))
async def test_values_are_found_on_every_node(cluster: list[StoreServer], first: int) -> None:
    """Whichever the settings name: one of them has the epochs."""
    async with store_at(cluster[first].url) as store:
        assert await store.merge_epochs({"all": "0" * 16}) == {"all": "0" * 16}
        await asyncio.gather(*(store.put(key(n), str(n).encode(), 60) for n in range(200)))
        values = await asyncio.gather(*(store.get(key(n)) for n in range(200)))
        assert values == [str(n).encode() for n in range(200)]
        assert await store.get(key(999)) is None
        kept = [int(redis_cli(server, "dbsize")) for server in cluster]
        assert sum(kept) == 201
        assert min(kept) > 20
        assert await store.count("all") == 200


async def test_counts_by_scope(cluster: list[StoreServer]) -> None:
    async with store_at(cluster[0].url) as store:
        for number in range(30):
            adapter = "clinic" if number % 3 == 0 else ""
            await store.put(key(number, adapter=adapter, tenant=f"{number % 2:02}"), b"x", 60)
        counts = [await store.count(s) for s in ("all", "adapter:clinic", "tenant:00", "tenant:99")]
        assert counts == [30, 10, 15, 0]


async def test_replicas_share_and_hear_of_flushes(cluster: list[StoreServer]) -> None:
    async with cache_at(cluster[0].url) as one, cache_at(cluster[2].url) as two:
        for number in range(50):
            await keep(one, f"text {number}")
            assert await find(two, f"text {number}") == "the answer"
            assert one.has_store
            assert two.has_store
        await one.flush("all")
        await until(lambda: one._epochs.seen == two._epochs.seen)
        assert await find(two, "text 7") is None
    assert failures(one, two) == 0


async def test_a_slot_that_moves(cluster: list[StoreServer]) -> None:
    async with store_at(cluster[0].url) as store:
        for number in range(200):
            await store.put(key(number), str(number).encode(), 60)
        # Nodes that trade their slots' owners while a client is connected send it on, too.
        old, new = cluster[0], cluster[1]
        name = redis_cli(old, "randomkey")
        slot = redis_cli(old, "cluster", "keyslot", name)
        target = redis_cli(new, "cluster", "myid")
        source = redis_cli(old, "cluster", "myid")
        redis_cli(new, "cluster", "setslot", slot, "importing", source)
        redis_cli(old, "cluster", "setslot", slot, "migrating", target)
        try:
            redis_cli(old, "migrate", "127.0.0.1", str(new.port), name, "0", "5000")
            for _ in range(5):  # ASK: whoever is on the move is missed, and nothing else
                values = await asyncio.gather(*(store.get(key(n)) for n in range(200)))
                missed = [n for n, value in enumerate(values) if value != str(n).encode()]
                assert {values[n] for n in missed} <= {None, b"new"}
                assert len(missed) < 5
                await asyncio.gather(*(store.put(key(n), b"new", 60) for n in missed))
        finally:
            while found := redis_cli(old, "cluster", "getkeysinslot", slot, "1").strip("[]' "):
                redis_cli(old, "migrate", "127.0.0.1", str(new.port), found, "0", "5000")
            for server in cluster:
                redis_cli(server, "cluster", "setslot", slot, "node", target)
        values = await asyncio.gather(*(store.get(key(n)) for n in range(200)))  # MOVED
        assert {values[n] for n in range(200) if values[n] != str(n).encode()} <= {b"new"}


async def test_nobody_gets_what_another_asked_for(
    cluster: list[StoreServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers that leave, and nodes that are late, must not put answers into other hands."""
    async with store_at(cluster[0].url) as store:
        for number in range(60):
            await store.put(key(number), str(number).encode(), 60)

        async def ask_and_leave(number: int, steps: int) -> None:
            asked = asyncio.create_task(store.get(key(number)))
            for _ in range(steps):
                await asyncio.sleep(0)
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await asked == str(number).encode()

        for steps in range(12):
            await asyncio.gather(*(ask_and_leave(number, steps) for number in range(60)))
            values = await asyncio.gather(*(store.get(key(n)) for n in range(60)))
            assert values == [str(n).encode() for n in range(60)]
        cluster[1].pause()
        try:
            with monkeypatch.context() as patched:
                patched.setattr(store, "_timeout_s", 0.2)
                late = await asyncio.gather(
                    *(store.get(key(n)) for n in range(60)), return_exceptions=True
                )
        finally:
            cluster[1].go_on()
        rest = {n: end for n, end in enumerate(late) if not isinstance(end, StoreError)}
        assert rest == {n: str(n).encode() for n in rest}
        assert len(rest) < 60
        values = await asyncio.gather(*(store.get(key(n)) for n in range(60)))
        assert values == [str(n).encode() for n in range(60)]


async def test_without_one_of_its_nodes_it_is_not_used_until_that_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="packhorse.cache")
    with running_cluster(tmp_path) as servers:
        async with cache_at(servers[0].url, timeout_s=0.5) as one:
            for number in range(20):
                await keep(one, f"text {number}")
            store: Any = one._store
            epochs_slot = store._cluster.keyslot("test:epochs")
            holder = store._cluster.nodes_manager.get_node_from_slot(epochs_slot).port
            lost = next(server for server in servers if server.port != holder)
            lost.kill()
            caplog.clear()
            asked = 0
            while one.has_store:  # until it is noticed
                await find(one, f"other {asked}")
                asked += 1
            looks = 0
            merge = store.merge_epochs

            async def counted(seen: Any) -> Any:
                nonlocal looks
                looks += 1
                return await merge(seen)

            store.merge_epochs = counted
            await until(lambda: looks > 3)
            assert not one.has_store
            assert caplog.text.count("does without") == 1
            assert "uses" not in caplog.text
            lost.start()
            await until(lambda: one.has_store)
            await keep(one, "again")
            assert await find(one, "again") == "the answer"


async def test_what_a_cluster_cannot_have_is_said_and_stays_so(
    cluster: list[StoreServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RedisStore(cluster[0].url, "test", 20)
    try:
        monkeypatch.setattr(store, "_url", "unix:///run/redis.sock")
        for _ in range(5):
            with pytest.raises(
                StoreError, match="is a Redis Cluster, which needs another URL: Unix"
            ):
                await asyncio.gather(*(store.get(key(n)) for n in range(20)))
        with pytest.raises(StoreError, match="Redis Cluster"):
            await store.merge_epochs({})
    finally:
        await store.close()
    async with store_at(cluster[0].url.replace("/0", "/3")) as other:
        with pytest.raises(StoreError, match="SELECT"):
            await other.get(key(1))
