"""The result cache on the real engine: two tenants, an adapter that is replaced, a Redis server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from packhorse.quantize.quality.evaluate import read_questions, visible
from tests.client import CHAT, TEXT, children, events, metric, wait_for
from tests.conftest import DEMO, Server, running_server
from tests.e2e.conformance_prompts import GET_WEATHER
from tests.e2e.questions import QUESTIONS
from tests.stores import StoreServer, running_store

ADAPTERS = DEMO / "adapters"
MARK = "x-packhorse-cache"
LONG = " ".join(f"number {number}" for number in range(200))  # more than two blocks of 128 tokens


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with running_store("redis", tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def server(
    int8_folder: Path, store: StoreServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("caching")
    shutil.copytree(ADAPTERS / "clinic", folder / "watched/clinic")
    keys = [
        {
            "name": name,
            "scopes": scopes,
            "sha256": hashlib.sha256(key_of(name).encode()).hexdigest(),
        }
        for name, scopes in (
            ("a", ["inference"]),
            ("b", ["inference"]),
            ("op", ["inference", "admin", "metrics"]),
        )
    ]
    (folder / "keys.yaml").write_text(json.dumps(keys))
    settings = {
        "auth": {"keys_file": str(folder / "keys.yaml")},
        "cache": {"store": store.url, "secret": "a secret for this test"},
        "engine": {"tool_call_parser": "hermes", "max_loras": 2},
        "adapters": {
            "folder": str(folder / "watched"),
            "store": str(folder / "store"),
            "allowed_roots": [str(ADAPTERS)],
        },
        "supervisor": {"backoff_s": 0},
    }
    (folder / "serve.yaml").write_text(json.dumps(settings))
    arguments = (str(int8_folder), "--config", str(folder / "serve.yaml"))
    with running_server(folder, *arguments, cache=True) as server:
        yield server


def key_of(name: str) -> str:
    return f"key-of-{name}-for-this-test"


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key_of(name)}"}


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120, headers=bearer("op")) as client:
        yield client


def end_engine(server: Server) -> None:
    """The engine's process alone: the one that it was born of has the next ready in seconds."""
    for process in children(server.process.pid):
        if "EngineCore" in process.name() + " ".join(process.cmdline()):
            process.kill()


def question(number: int, **fields: Any) -> dict[str, Any]:
    messages = [dict(message) for message in QUESTIONS[number].messages]
    return {"messages": messages, "temperature": 0, "max_tokens": 64, **fields}


def ask(
    http: httpx.Client, body: dict[str, Any], path: str = CHAT, key: str = "op"
) -> httpx.Response:
    response = http.post(path, json=body, headers=bearer(key))
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize(("sampling", "generations"), [({"temperature": 0}, 1), ({}, 64)])
async def test_64_equal_requests(
    server: Server, http: httpx.Client, sampling: dict[str, Any], generations: int
) -> None:
    """Counted by the engine itself."""
    body = {"model": server.model, "prompt": "Tell me more", "max_tokens": 24, "ignore_eos": True}
    before = metric_sum(http, "vllm:generation_tokens_total")
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=120, headers=bearer("op"), limits=limits
    ) as client:
        responses = await asyncio.gather(
            *(
                client.post(TEXT, json={**body, **sampling, "stream": number % 2 == 0})
                for number in range(64)
            )
        )
    assert {response.status_code for response in responses} == {200}
    assert metric_sum(http, "vllm:generation_tokens_total") - before == 24 * generations
    marks = Counter(response.headers[MARK] for response in responses)
    assert marks == ({"miss": 1, "coalesced": 63} if generations == 1 else {"bypass": 64})
    texts = {
        "".join(choice["text"] for event in events(r) for choice in event["choices"])
        if number % 2 == 0
        else r.json()["choices"][0]["text"]
        for number, r in enumerate(responses)
    }
    assert len(texts) == 1 if generations == 1 else len(texts) > 20


def metric_sum(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"n": 2, "temperature": 0.8, "seed": 5},
        {"response_format": {"type": "json_object"}},
        {"return_token_ids": True},
        {"tools": [GET_WEATHER]},
        {"stop": ["e"], "include_stop_str_in_output": True},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
@pytest.mark.parametrize("first", ["whole", "streamed"])
def test_a_hit_says_what_the_engine_said(
    server: Server, http: httpx.Client, fields: dict[str, Any], first: str
) -> None:
    """Whole and streamed, whichever came first. Parsed answers are kept apart for each."""
    body = question(7, model=server.model, **fields)
    body["messages"][-1]["content"] += f" ({first}, {len(str(fields))})"
    streaming = {**body, "stream": True, "stream_options": {"include_usage": True}}
    order = [body, streaming] if first == "whole" else [streaming, body]
    parsed = "tools" in fields
    found = [ask(http, one) for one in order + order]
    marks = [response.headers[MARK] for response in found]
    assert marks == ["miss", "miss" if parsed else "hit", "hit", "hit"]
    whole = [response.json() for response in found if "json" in response.headers["content-type"]]
    streams = [events(r) for r in found if "event-stream" in r.headers["content-type"]]
    for document in whole:
        del document["id"], document["created"]
    assert whole[0] == whole[1]
    for stream in streams:
        for choice in whole[0]["choices"]:
            pieces = [c for e in stream for c in e["choices"] if c["index"] == choice["index"]]
            text = "".join(piece["delta"].get("content") or "" for piece in pieces)
            if not parsed:  # vLLM's parsers differ in white space
                assert text == choice["message"]["content"]
            assert pieces[-1]["finish_reason"] == choice["finish_reason"]
            if choice["logprobs"]:
                entries = [e for p in pieces for e in (p["logprobs"] or {}).get("content") or ()]
                assert entries == choice["logprobs"]["content"]
        if not parsed:  # else each was generated
            assert stream[-1]["usage"] == whole[0]["usage"]


def test_the_prefix_cache_is_a_tenants_own(server: Server, http: httpx.Client) -> None:
    def cached(key: str, **fields: Any) -> int:
        body = {
            "model": server.model, "prompt": LONG, "max_tokens": 1, "temperature": 0,
            "cache": {"mode": "off"}, **fields,
        }  # fmt: skip
        before = metric_sum(http, "vllm:prefix_cache_hits_total")
        answer = ask(http, body, TEXT, key).json()
        details = answer["usage"]["prompt_tokens_details"] or {}
        hits = int(metric_sum(http, "vllm:prefix_cache_hits_total") - before)
        assert hits == details.get("cached_tokens", 0)
        return hits

    assert cached("a") == 0
    assert cached("a") >= 256
    assert cached("b") == 0, "another tenant's blocks are not there for it"
    assert cached("b") >= 256
    assert cached("a", cache_salt="mine") == 0
    assert cached("a", cache_salt="mine") >= 256
    assert cached("b", cache_salt="mine") == 0


def test_the_prefix_cache_is_apart_without_a_result_cache(demo_server: Server) -> None:
    def cached(http: httpx.Client, **fields: Any) -> int:
        body = {"model": demo_server.model, "prompt": LONG, "max_tokens": 1, **fields}
        answer = http.post(TEXT, json=body)
        assert answer.headers.get(MARK) in (None, "bypass"), "this server has no result cache"
        return (answer.json()["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)

    with httpx.Client(base_url=demo_server.url, timeout=120) as http:
        cached(http)
        assert cached(http) >= 256
        assert cached(http, cache_salt="mine") == 0, "nobody else has sent this salt"
        assert cached(http, cache_salt="mine") >= 256


def test_a_seed_of_minus_one_is_a_fresh_sample(server: Server, http: httpx.Client) -> None:
    body = {"model": server.model, "prompt": "Tell me", "max_tokens": 24, "ignore_eos": True}
    found = [ask(http, {**body, "temperature": 1.5, "seed": -1}, TEXT) for _ in range(4)]
    assert {response.headers[MARK] for response in found} == {"bypass"}
    assert len({response.json()["choices"][0]["text"] for response in found}) == 4


def test_users_behind_one_key_are_apart_by_their_salts(server: Server, http: httpx.Client) -> None:
    body = question(13, model=server.model)
    salted = [{**body, "cache_salt": salt} for salt in ("user-a", "user-b", "user-a")]
    assert [ask(http, one).headers[MARK] for one in salted] == ["miss", "miss", "hit"]


def test_a_new_engine_is_the_same_model(server: Server, http: httpx.Client) -> None:
    body = question(11, model=server.model)
    first = ask(http, body)
    end_engine(server)
    wait_for(lambda: http.get("/health/ready").status_code == 503)
    wait_for(lambda: http.get("/health/ready").status_code == 200, 90)
    again = ask(http, body)
    assert [response.headers[MARK] for response in (first, again)] == ["miss", "hit"]
    assert ask(http, {**body, "cache": {"mode": "refresh"}}).headers[MARK] == "miss"


async def test_500_mixed_requests_while_an_adapter_is_replaced(
    server: Server, http: httpx.Client, store: StoreServer
) -> None:
    """No answer from another version, none from another tenant; flushes and a Redis that dies."""
    rng = random.Random(3)
    asked = read_questions(DEMO / "eval/clinic.jsonl")[:12]

    def bodies(number: int) -> dict[str, Any]:
        return {
            "model": "clinic",
            "messages": asked[number].messages,
            "temperature": 0,
            "max_tokens": 64,
        }

    def put(version: str) -> None:
        body = {"name": "clinic", "path": str(ADAPTERS / version), "replace": True}
        response = http.post("/admin/adapters", json=body, timeout=120)
        assert response.status_code == 200, response.text

    def say(number: int) -> str:
        body = {**bodies(number), "cache": {"mode": "off"}}
        return visible(ask(http, body).json()["choices"][0]["message"]["content"])

    right: dict[str, list[str]] = {}
    for version in ("clinic-v2", "clinic"):
        await asyncio.to_thread(put, version)
        right[version] = [await asyncio.to_thread(say, number) for number in range(len(asked))]
    assert sum(one != two for one, two in zip(*right.values(), strict=True)) > 8
    current = "clinic"
    changing = False
    marks: Counter[str] = Counter()
    started: Counter[tuple[str, int]] = Counter()
    wrong: list[Any] = []

    async def one(client: httpx.AsyncClient) -> None:
        number, tenant = rng.randrange(len(asked)), rng.choice("ab")
        version, was_changing = current, changing
        kind = (tenant, number)
        started[kind] += 1
        streamed = rng.random() < 0.5
        response = await client.post(
            CHAT, json={**bodies(number), "stream": streamed}, headers=bearer(tenant)
        )
        assert response.status_code == 200, response.text
        mark = response.headers[MARK]
        marks[mark] += 1
        if streamed:
            text = "".join(
                c["delta"].get("content") or "" for e in events(response) for c in e["choices"]
            )
        else:
            text = response.json()["choices"][0]["message"]["content"]
        between = was_changing or changing or version != current
        allowed = {right[v][number] for v in (right if between else (version,))}
        # The only one of its kind so far has nothing to be taken from, unless another tenant's.
        alone = started[kind] == 1
        if visible(text) not in allowed or (alone and mark != "miss"):
            wrong.append((tenant, number, version, mark, text, allowed))

    async def change() -> None:
        nonlocal current, changing
        for number in range(10):
            await asyncio.sleep(0.6)
            changing = True
            version = ("clinic-v2", "clinic")[number % 2]
            await asyncio.to_thread(put, version)
            current, changing = version, False
            if number == 3:
                gone = await asyncio.to_thread(http.delete, "/admin/cache")
                assert gone.json()["flushed"]
            if number == 5:
                await asyncio.to_thread(store.kill)
            if number == 7:
                await asyncio.to_thread(store.start)

    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        changes = asyncio.create_task(change())
        left = 500

        async def caller() -> None:
            nonlocal left
            while left > 0 or not changes.done():
                left -= 1
                await one(client)

        await asyncio.gather(*(caller() for _ in range(12)))
        await changes
    assert not wrong, wrong[:3]
    assert sum(marks.values()) >= 500
    assert marks["hit"] > 100, marks
    assert marks["miss"] > 20, marks
    wait_for(lambda: metric(http, "packhorse_cache_store_up") == 1)
