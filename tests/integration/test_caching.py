"""The result cache over HTTP: headers, policies, operators; and mixed requests with everything
changing under them, of which none may get a wrong answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.cache import STORES
from packhorse.serve.cache.result_cache import STALE_S
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.errors import ServeError
from packhorse.serve.messages import AdapterVersion, Caller, Chunk, GenerateRequest, Prompt, Route
from packhorse.serve.models import Model, Models
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.settings.engine import EngineSettings
from packhorse.serve.tenancy import Tenancy
from tests.client import CHAT, TEXT, events, hello
from tests.integration.caching import MARK, a_cache, caching, greedy, mark
from tests.integration.serving import bearer, serving, until, write_keys
from tests.stores import running_store
from tests.unit.serve.cache.making import ask

ADMIN = "/admin/cache"


async def test_a_hit_is_the_same_answer_under_a_new_id() -> None:
    async with caching() as served:
        first = await served.http.post(CHAT, json=greedy(logprobs=False))
        second = await served.http.post(CHAT, json=greedy())
    assert [response.headers[MARK] for response in (first, second)] == ["miss", "hit"]
    one, two = first.json(), second.json()
    assert one.pop("id") != two.pop("id")
    assert one.pop("created") <= two.pop("created")
    assert one == two


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_a_stream_is_replayed(path: str) -> None:
    text = (
        {"messages": [{"role": "user", "content": "a b c"}]}
        if path == CHAT
        else {"prompt": "a b c"}
    )
    body = {"model": "echo", "temperature": 0, **text}
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with caching() as served:
        live = await served.http.post(path, json=streamed)
        again = await served.http.post(path, json=streamed)
        whole = await served.http.post(path, json=body)
    assert [r.headers[MARK] for r in (live, again, whole)] == ["miss", "hit", "hit"]

    def said(response: Any) -> tuple[str, Any, Any]:
        found = events(response)
        choices = [choice for event in found for choice in event["choices"]]
        text = "".join(c.get("text") or c.get("delta", {}).get("content", "") for c in choices)
        return text, choices[-1]["finish_reason"], found[-1]["usage"]

    assert said(live) == said(again) == ("a b c", "stop", whole.json()["usage"])


async def test_headers_and_fields_say_what_to_do() -> None:
    async with caching() as served:
        assert await mark(served, greedy(), cache_control="no-store") == "bypass"
        assert await mark(served, greedy()) == "miss"
        assert await mark(served, greedy(), cache_control="no-cache") == "miss"
        assert await mark(served, greedy(), cache_control="max-age=60, no-transform") == "hit"
        assert await mark(served, greedy(), cache_control="max-age=0") == "miss"
        assert await mark(served, greedy(cache={"mode": "off"})) == "bypass"
        assert await mark(served, greedy(cache={"max_age_s": 60})) == "hit"
        assert (
            await mark(served, greedy(cache={"max_age_s": 60}), cache_control="max-age=0") == "miss"
        )
        assert (
            await mark(served, greedy(cache={"mode": "refresh"}), cache_control="no-store")
            == "miss"
        )
        assert await mark(served, hello("a", temperature=1)) == "bypass"
        assert await mark(served, hello("a", temperature=1, cache={"mode": "always"})) == "miss"
        assert await mark(served, hello("a", temperature=1, cache={"mode": "always"})) == "hit"


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"cache": {"mode": "sometimes"}}, {}),
        ({"cache": {"max_age_s": -1}}, {}),
        ({"cache": "off"}, {}),
        ({"cache_salt": ""}, {}),
        ({"cache_salt": 7}, {}),
        ({"cache_salt": "x" * 1025}, {}),
        ({}, {"cache-control": "max-age=soon"}),
    ],
    ids=str,
)
async def test_bad_policies_are_refused(fields: dict[str, Any], headers: dict[str, str]) -> None:
    async with caching() as served:
        response = await served.http.post(CHAT, json=greedy(**fields), headers=headers)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"]


async def test_a_server_without_a_cache_says_nothing_of_it() -> None:
    async with serving() as served:
        response = await served.http.post(CHAT, json=greedy())
        assert MARK not in response.headers
        assert (await served.http.get(ADMIN)).status_code == 404
        assert (await served.http.delete(ADMIN)).status_code == 404


async def test_coalesced_over_http() -> None:
    async with caching(delay_s=0.02) as served:
        marks = await asyncio.gather(
            *(mark(served, greedy(stream=number % 2 == 0)) for number in range(16))
        )
    assert Counter(marks) == {"miss": 1, "coalesced": 15}


async def test_a_client_that_leaves_ends_nothing_for_the_others() -> None:
    text = "a b c d e f g h i j"
    async with caching(delay_s=0.2) as served:
        async with served.http.stream("POST", CHAT, json=greedy(text, stream=True)) as leader:
            parts = leader.aiter_bytes()
            await anext(parts)
            follower = asyncio.create_task(served.http.post(CHAT, json=greedy(text)))
            await until(lambda: served.pipeline._in_flight == 2)
            await anext(parts)  # until then the leader reads for both
        assert (await follower).json()["choices"][0]["message"]["content"] == text
        assert served.engine.aborted == 0
        other = greedy(text + " k", stream=True)
        async with served.http.stream("POST", CHAT, json=other) as alone:
            parts = alone.aiter_bytes()
            await anext(parts)
        await until(lambda: served.engine.aborted == 1)


async def test_tenants_are_apart_and_keys_of_one_share(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.yaml",
        a1={"tenant": "a"},
        a2={"tenant": "a"},
        b={"tenant": "b"},
        op={"scopes": ["admin", "inference"]},
    )
    async with caching(keys=keys) as served:
        marks = [await mark(served, greedy(), **bearer(name)) for name in ("a1", "a2", "b", "b")]
        assert marks == ["miss", "hit", "miss", "hit"]
        assert (await served.http.delete(ADMIN, headers=bearer("a1"))).status_code == 403
        flushed = await served.http.delete(ADMIN, params={"tenant": "a"}, headers=bearer("op"))
        assert flushed.json()["memory_entries"] == 1
        assert [await mark(served, greedy(), **bearer(name)) for name in ("a2", "b")] == [
            "miss",
            "hit",
        ]


async def test_operators_flush() -> None:
    async with caching() as served:
        for text in ("one", "two"):
            await mark(served, greedy(text))
        held = (await served.http.get(ADMIN)).json()
        assert held["memory_entries"] == 2
        assert held["store_entries"] is None
        dry = await served.http.delete(ADMIN, params={"dry_run": "true", "model": "echo"})
        assert dry.json() == held
        assert await mark(served, greedy("one")) == "hit"
        gone = await served.http.delete(ADMIN, params={"model": "echo"})
        assert gone.json() == {**held, "flushed": True}
        assert await mark(served, greedy("one")) == "miss"
        await served.http.delete(ADMIN)
        assert await mark(served, greedy("one")) == "miss"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"modle": "echo"}, 400),
        ({"model": "other"}, 404),
        ({"adapter": "none"}, 404),
        ({"model": "echo", "tenant": "a"}, 400),
        ({"dry_run": "yes"}, 400),
    ],
    ids=str,
)
async def test_a_slip_of_the_pen_flushes_nothing(query: dict[str, str], status: int) -> None:
    async with caching() as served:
        await mark(served, greedy())
        response = await served.http.delete(ADMIN, params=query)
        assert response.status_code == status, response.text
        assert await mark(served, greedy()) == "hit"


KINDS = ("hit", "coalesced", "miss", "bypass")


class Witness(EchoEngine):
    """Answers with a digest of everything it was given, and of the time: `era` goes up with every
    flush, so that an answer from before one can be told.
    """

    def __init__(self) -> None:
        super().__init__(EngineSettings(kind="echo"))
        self.era = 0
        self.generations = 0

    @staticmethod
    def says(request: GenerateRequest, prompt: Prompt, route: Route) -> str:
        sampling = request.sampling
        if sampling.temperature == 0:
            sampling = replace(sampling, seed=None)  # without effect
        seen = (
            list(prompt.token_ids), prompt.max_tokens, sampling,
            route.prefix_cache_salt, route.model, route.adapter.digest if route.adapter else None,
        )  # fmt: skip
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        self.generations += 1
        era = self.era
        text = self.says(request, prompt, route)
        await asyncio.sleep(random.random() * 0.004)
        if random.random() < 0.02:
            raise RuntimeError("an engine that fails now and then")
        yield Chunk(text[:8], [1])
        await asyncio.sleep(random.random() * 0.004)
        yield Chunk(f"{text[8:]} {era}", [2], "stop")


class Lease:
    def __init__(self, adapter: AdapterVersion) -> None:
        self.adapter = adapter

    def duplicate(self) -> Lease:
        return Lease(self.adapter)

    async def ready(self, prompt_tokens: int, max_tokens: int) -> None: ...

    def release(self, used_tokens: int = 0) -> None: ...


class Adapters:
    """One adapter, which is replaced now and then."""

    names = ("clinic",)

    def __init__(self) -> None:
        self.version = 0

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def lease(self, name: str) -> Lease:
        digest = hashlib.sha256(str(self.version).encode()).hexdigest()
        return Lease(AdapterVersion(name, digest, Path(), self.version + 1, 8))


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", ["redis", "memcached"])
async def test_of_mixed_requests_none_is_answered_wrong(
    kind: str, rounds: int, tmp_path: Path
) -> None:
    """Two replicas on one store, 2 tenants, 20 keys; replacements, flushes, restarts of the store,
    engine failures and clients that leave.

    It is not the number of requests that proves it, but what has met what. In a round everything
    that disturbs has come, while 32 clients ask; and there are more rounds until each kind of
    answer has been given 5 times.
    """
    rng = random.Random(7)
    with running_store(kind, tmp_path) as store_server:
        engine, adapters = Witness(), Adapters()
        caches, pipelines, watching = [], [], []
        for _ in range(2):
            store = STORES[kind](store_server.url, "test", 0.5)
            cache = a_cache(store=store)
            await cache.start()
            tenancy = Tenancy(b"s" * 32)
            model = Model("echo", cache=cache, adapters=adapters)  # type: ignore[arg-type]
            model.attach(engine)
            caches.append(cache)
            pipelines.append(Pipeline(Models(model), tenancy=tenancy))
            watching.append(asyncio.create_task(cache.watch()))
        callers = [Caller(f"key-{n}", f"tenant-{n % 2}", frozenset()) for n in range(20)]
        wrong: list[Any] = []
        marks: Counter[str] = Counter()
        failed = 0
        settled_era = 0  # every replica knows of the flushes up to here

        async def one() -> None:
            nonlocal failed
            request = replace(
                ask(
                    f"prompt {min(int(rng.paretovariate(0.9)), 60)}",
                    max_tokens=rng.choice((5, 6)),
                    temperature=rng.choice((0.0, 0.0, 0.0, 0.7)),
                    seed=rng.choice((None, None, 3)),
                    n=1,
                    stream=rng.random() < 0.5,
                    model=rng.choice(("echo", "clinic")),
                ),
                caller=rng.choice(callers),
            )
            era, pipeline = settled_era, rng.choice(pipelines)
            try:
                stream = await pipeline.start(request)
                if rng.random() < 0.05:
                    await stream.close()
                    return
                said = "".join([chunk.text async for chunk in stream])
            except ServeError:
                failed += 1
                return
            marks[stream.context.cache_status] += 1
            text, _, of_era = said.partition(" ")
            expected = Witness.says(request, stream.context.prompt, stream.context.route)
            if text != expected or int(of_era) < era:
                wrong.append((said, expected, era, stream.context.cache_status))

        async def disturb() -> None:
            done = 0
            while done < rounds or not settled_era or min(marks[kind] for kind in KINDS) < 5:
                for action in ("replace", "flush", "replace", "restart", "flush"):
                    await asyncio.sleep(0.15)
                    await disturb_by(action)
                done += 1

        async def disturb_by(action: str) -> None:
            nonlocal settled_era
            match action:
                case "replace":
                    adapters.version += 1
                case "flush":
                    engine.era += 1
                    with contextlib.suppress(ServeError):
                        await rng.choice(caches).flush("all")
                        era = engine.era
                        await asyncio.sleep(STALE_S)
                        settled_era = era
                case "restart":
                    await asyncio.to_thread(store_server.kill)
                    await asyncio.sleep(0.3)
                    await asyncio.to_thread(store_server.start)

        disturbing = asyncio.create_task(disturb())

        async def client() -> None:
            while not disturbing.done():
                await one()
                await asyncio.sleep(rng.random() * 0.03)

        await asyncio.gather(*(client() for _ in range(32)))
        await disturbing
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        for cache in caches:
            await cache.close()
    assert not wrong, wrong[:3]
    # 2 in 100 of those that reach the engine; who joined such a one fails with it.
    assert failed < 0.15 * (sum(marks.values()) + failed)
