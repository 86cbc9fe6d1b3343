"""The shared tier against real Redis and Memcached servers, and against what is none."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis as redis_client

from packhorse.serve.cache import STORES
from packhorse.serve.cache.base import Store, StoreError
from packhorse.serve.cache.key import Key
from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.cache.single_flight import Flight
from packhorse.serve.cache.store_keys import store_key
from packhorse.serve.errors import Unavailable
from packhorse.serve.messages import Chunk, GenerateRequest, Prompt, Route
from tests.integration.serving import until, until_there
from tests.stores import StoreServer, free_port, running_store
from tests.unit.serve.cache.making import GREEDY, ask, key

SECRET = b"s" * 32
ANSWER = (Chunk("the answer", [1, 2], "stop"),)


def prompt(text: str) -> Prompt:
    return Prompt(tuple(text.encode()), 10, effective_sampling=GREEDY)


@pytest.fixture(params=["redis", "memcached"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    with running_store(request.param, tmp_path) as running:
        yield running


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[StoreServer]:
    with running_store("redis", tmp_path) as running:
        yield running


@asynccontextmanager
async def store_at(url: str, timeout_s: float = 20.0) -> AsyncIterator[Store]:
    store = STORES[url.partition("://")[0]](url, "test", timeout_s)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def cache_at(
    url: str, *, timeout_s: float = 20.0, memory: int = 2**20
) -> AsyncIterator[ResultCache]:
    """A replica, watching; it gives up on a store late, since the machine may be busy."""
    store = STORES[url.partition("://")[0]](url, "test", timeout_s)
    cache = ResultCache(SECRET, memory_bytes=memory, max_entry_bytes=2**20, ttl_s=60, store=store)
    cache.fingerprint = b"model"
    await cache.start()
    watching = asyncio.create_task(cache.watch())
    try:
        yield cache
    finally:
        watching.cancel()
        await cache.close()


def key_of(cache: ResultCache, request: GenerateRequest, text: str) -> Key | None:
    if not cache.concerns(request):
        return None
    return cache.key(request, Route("echo"), cache.learn(request, prompt(text)))


async def find(cache: ResultCache, text: str = "one", tenant: str = "acme") -> str | None:
    """What the cache has for a request, in either tier."""
    request = ask(text, tenant=tenant)
    made = key_of(cache, request, text)
    if made is None:
        return None
    result = cache.recall(made, request) or await cache.fetch(made, request)
    return result.chunks[0].text if result else None


async def is_missing(cache: ResultCache) -> bool:
    return await find(cache) is None


async def keep(cache: ResultCache, text: str = "one", tenant: str = "acme") -> None:
    """As if an engine had answered."""
    request = ask(text, tenant=tenant)
    made = key_of(cache, request, text)
    assert made is not None
    flight = cache.lead(made, streams=True)
    assert isinstance(flight, Flight)
    flight._end(None, ANSWER)
    await asyncio.gather(*cache._puts)


def redis_cli(server: StoreServer, *command: str) -> str:
    with redis_client.Redis(port=server.port, decode_responses=True) as client:
        return str(client.execute_command(*command))


async def test_values_come_back(server: StoreServer) -> None:
    async with store_at(server.url) as store:
        assert await store.get(key(1)) is None
        await store.put(key(1), b"\x00\r\nbytes\xff", 60)
        assert await store.get(key(1)) == b"\x00\r\nbytes\xff"
        assert await store.get(key(2)) is None
        await asyncio.gather(*(store.put(key(n), str(n).encode(), 60) for n in range(200)))
        values = await asyncio.gather(*(store.get(key(n)) for n in range(200)))
        assert values == [str(n).encode() for n in range(200)]


async def test_values_end(server: StoreServer) -> None:
    async with store_at(server.url) as store:
        await store.put(key(1), b"x", 1)
        await store.put(key(2), b"x", 600)
        async with asyncio.timeout(30):
            while await store.get(key(1)) is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await store.get(key(2)) == b"x"


async def test_what_is_cancelled_ends_wherever_it_is(server: StoreServer) -> None:
    """Redis' client waits with asyncio.wait_for, which forgets that on Python 3.11 at times."""
    async with store_at(server.url) as connected:
        await connected.merge_epochs({"all": "0" * 16})
        for steps in range(50):
            async with store_at(server.url) as fresh:
                for store in (connected, fresh):
                    asked = asyncio.create_task(store.merge_epochs({}))
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    if asked.cancel():
                        with pytest.raises(asyncio.CancelledError):
                            await asked
        assert await connected.merge_epochs({}) == {"all": "0" * 16}


async def test_epochs_are_merged(server: StoreServer) -> None:
    low, high = "0" * 15 + "1", "0" * 15 + "2"
    async with store_at(server.url) as store:
        assert await store.merge_epochs({}) == {}
        assert await store.merge_epochs({"all": high}) == {"all": high}
        assert await store.merge_epochs({"all": low, "adapter:é": low}) == {
            "all": high,
            "adapter:é": low,
        }
        many = [
            store.merge_epochs({f"tenant:{number}": f"{number + 1:016x}"}) for number in range(30)
        ]
        await asyncio.gather(*many)
        assert len(await store.merge_epochs({})) == 32


async def test_redis_counts_by_scope(redis: StoreServer) -> None:
    async with store_at(redis.url) as store:
        for number in range(30):
            adapter = "clinic" if number % 3 == 0 else ""
            await store.put(key(number, adapter=adapter, tenant=f"{number % 2:02}"), b"x", 60)
        await store.merge_epochs({"all": "0" * 16})
        counts = [
            await store.count(scope)
            for scope in ("all", "adapter:clinic", "tenant:00", "tenant:99", "model:echo")
        ]
        assert counts == [30, 10, 15, 0, 30]


async def test_replicas_share(server: StoreServer) -> None:
    async with cache_at(server.url) as one, cache_at(server.url) as two:
        assert await find(one) is None
        await keep(one)
        assert await find(two) == "the answer"
        assert await find(two, tenant="other") is None
        other = ResultCache(b"t" * 32, memory_bytes=0, max_entry_bytes=9, ttl_s=9, store=one._store)
        other.fingerprint = b"model"
        await other.start()
        assert await find(other) is None, "another secret, another world"


async def test_a_flush_reaches_every_replica(server: StoreServer) -> None:
    async with cache_at(server.url) as one, cache_at(server.url) as two:
        for text in ("one", "two"):
            for tenant in ("acme", "other"):
                await keep(one, text, tenant)
                assert await find(two, text, tenant)
        await one.flush(one.tenant_scope("acme"))
        assert await find(one) is None
        await until_there(lambda: is_missing(two))
        assert await find(two, "two") is None
        assert await find(two, "one", "other") == "the answer"
        await two.flush("all")
        await until(lambda: one._epochs.seen == two._epochs.seen)
        assert await find(one, "one", "other") is None
    async with cache_at(server.url) as three:  # a restart revives nothing
        assert await find(three) is None
        assert await find(three, "one", "other") is None


async def test_a_store_that_forgot_revives_nothing(server: StoreServer) -> None:
    """Its epochs are written back by who has seen higher ones."""
    async with cache_at(server.url) as one:
        await one.flush("all")
        flushed = dict(one._epochs.seen)
        server.kill()
        await until(lambda: not one.has_store)
        server.start()
        await until(lambda: one.has_store)
        assert one._epochs.seen == flushed
        async with cache_at(server.url) as two:
            assert two._epochs.seen == flushed


async def test_a_fresh_store_starts_a_fresh_world(redis: StoreServer) -> None:
    """Epochs that were lost alone: what was kept under them is out of reach."""
    async with cache_at(redis.url) as one:
        await keep(one)
    redis_cli(redis, "del", "test:epochs")
    async with cache_at(redis.url) as two:
        assert await find(two) is None
        assert redis_cli(redis, "exists", "test:epochs") == "1"


async def test_old_epochs_are_written_over(redis: StoreServer) -> None:
    """As of a store that came back from an old copy of its data."""
    async with cache_at(redis.url) as one:
        await keep(one)
        old = redis_cli(redis, "hget", "test:epochs", "all")
        await one.flush("all")
        redis_cli(redis, "hset", "test:epochs", "all", old)
        await until(lambda: redis_cli(redis, "hget", "test:epochs", "all") > old)
        assert await find(one) is None


async def test_flushed_by_someone_else(server: StoreServer) -> None:
    async with cache_at(server.url, memory=0) as one:
        await keep(one)
        assert await find(one) == "the answer"
        server.kill()
        server.start()
        await until(lambda: one.has_store)
        assert await find(one) is None
        await keep(one)
        assert await find(one) == "the answer"


async def test_dead(server: StoreServer) -> None:
    async with cache_at(server.url) as one:
        await keep(one)
        server.kill()
        assert await find(one, "two") is None
        await until(lambda: not one.has_store)
        await until_there(lambda: is_missing(one))  # a flush elsewhere could not be told to it
        with pytest.raises(Unavailable, match="cannot be told"):
            await one.flush("all")
        server.start()
        await until(lambda: one.has_store)
        await keep(one)
        assert await find(one) == "the answer"


async def never_asked(*_: object) -> bytes:
    raise AssertionError("a store that does not answer is left alone")


async def test_paused(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cache_at(server.url, timeout_s=0.1) as one:
        await keep(one)
        server.pause()
        async with asyncio.timeout(30):  # it does not wait for ever
            assert await find(one, "two") is None
        await until(lambda: not one.has_store)
        with monkeypatch.context() as patched:
            patched.setattr(type(one._store), "get", never_asked)
            for number in range(100):
                assert await find(one, f"text {number}") is None
        server.go_on()
        await until(lambda: one.has_store)
        await keep(one, "three")
        assert await find(one, "three") == "the answer"


async def test_nobody_gets_what_another_asked_for(
    server: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers that leave, and a server that is late, must not put answers into other hands."""
    async with store_at(server.url) as store:
        for number in range(50):
            await store.put(key(number), str(number).encode(), 60)

        async def ask_and_leave(number: int) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    assert await store.get(key(number)) == str(number).encode()

        for _ in range(3):
            await asyncio.gather(*(ask_and_leave(number) for number in range(50)))
            values = await asyncio.gather(*(store.get(key(n)) for n in range(50)))
            assert values == [str(n).encode() for n in range(50)]
        server.pause()
        with monkeypatch.context() as patched:  # only what is late is waited for so little
            patched.setattr(store, "_timeout_s", 0.2)
            asked = [store.get(key(n)) for n in range(50)]
            late = await asyncio.gather(*asked, return_exceptions=True)
        # A server that is being stopped may answer some still, each with its own.
        rest = {n: end for n, end in enumerate(late) if getattr(end, "reason", "") != "timeout"}
        assert rest == {n: str(n).encode() for n in rest}
        assert len(rest) < 50
        server.go_on()
        values = await asyncio.gather(*(store.get(key(n)) for n in range(50)))
        assert values == [str(n).encode() for n in range(50)]


async def test_a_value_cut_short_is_a_miss(redis: StoreServer) -> None:
    async with cache_at(redis.url, memory=0) as one:
        await keep(one)
        made = key_of(one, ask("one", tenant="acme"), "one")
        assert made is not None
        name = store_key("test", made)
        redis_cli(redis, "setrange", name, "30", "garbage")
        assert await find(one) is None
        await keep(one)
        assert await find(one) == "the answer"
        redis_cli(redis, "set", name, "PH")
        assert await find(one) is None
        redis_cli(redis, "del", name)
        redis_cli(redis, "lpush", name, "not a string")
        assert await find(one) is None


async def test_out_of_memory(tmp_path: Path) -> None:
    options = ("--maxmemory", "2mb", "--maxmemory-policy", "noeviction")
    with running_store("redis", tmp_path, *options) as server:
        async with cache_at(server.url, memory=0) as one:
            await keep(one)
            redis_cli(server, "set", "filler", "x" * 100_000)
            redis_cli(server, "config", "set", "maxmemory", "1mb")
            await keep(one, "two")
            assert await find(one, "two") is None
            assert await find(one) == "the answer", "it still answers"


async def test_wrong_password(tmp_path: Path) -> None:
    with running_store("redis", tmp_path, "--requirepass", "right") as server:
        wrong = server.url.replace("redis://", "redis://:wrong@")
        async with cache_at(wrong) as one:
            assert not one.has_store
        async with store_at(wrong) as store:
            with pytest.raises(StoreError) as caught:
                await store.get(key(1))
            assert "wrong" not in store.name + str(caught.value).replace("wrong pass", "")
        async with cache_at(server.url.replace("redis://", "redis://:right@")) as one:
            assert one.has_store


@pytest.mark.parametrize("kind", ["redis", "memcached"])
@pytest.mark.parametrize("garbage", [b"garbage\r\n", b"\x00" * 5000, b"$-5\r\n", b"VALUE\r\n", b""])
async def test_garbage(kind: str, garbage: bytes) -> None:
    """A port that something else listens on."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1000):
                writer.write(garbage)
                await writer.drain()
                if not garbage:
                    break
        except OSError:
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening, store_at(f"{kind}://127.0.0.1:{port}", timeout_s=0.05) as store:
        for _ in range(5):
            with pytest.raises(StoreError):
                await store.get(key(1))
            with pytest.raises(StoreError):
                await store.put(key(1), b"x", 60)
            with pytest.raises(StoreError):
                await store.merge_epochs({"all": "0" * 16})


async def test_nobody_there() -> None:
    async with cache_at(f"redis://127.0.0.1:{free_port()}") as one:
        assert await find(one) is None
        assert not one.has_store


async def test_epochs_that_are_none(redis: StoreServer) -> None:
    redis_cli(redis, "hset", "test:epochs", "all", json.dumps("nonsense"))
    async with cache_at(redis.url) as one:
        assert not one.has_store
