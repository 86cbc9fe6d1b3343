"""Embeddings, rerank, score, classify and pooling over HTTP: shapes, refusals, keys, quotas, cache.

Over the echo engine, whose vectors can be worked out by hand; real models are in tests/e2e.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import CreateEmbeddingResponse

from packhorse.serve.app import create
from packhorse.serve.engines.echo import DIMENSIONS
from packhorse.serve.settings import Settings
from packhorse.serve.settings.engine import EngineSettings
from tests.client import CHAT, TEXT, request_lines
from tests.conftest import running_server
from tests.document import check_document
from tests.integration.caching import MARK, a_cache
from tests.integration.pooling import CALLS, EMBED, RERANK, Counting, cross_encoder, embedder
from tests.integration.serving import Served, bearer, nothing_left, serving, until, write_keys


async def ask(served: Served, path: str, /, **body: Any) -> Any:
    response = await served.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def refused(served: Served, path: str, /, **body: Any) -> Any:
    response = await served.http.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def cosine(a: list[float], b: list[float]) -> float:
    norm = sum(x * x for x in a) * sum(y * y for y in b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm**0.5


# Embeddings


async def test_the_openai_client_reads_both_encodings() -> None:
    async with serving(engine=embedder()) as served:
        client = AsyncOpenAI(base_url=f"{served.listeners.url}/v1", api_key="none")
        texts = ["one two", "three", "one two"]
        packed = await client.embeddings.create(model="echo", input=texts)  # base64, by default
        plain = await client.embeddings.create(model="echo", input=texts, encoding_format="float")
        assert [entry.index for entry in packed.data] == [0, 1, 2]
        assert [entry.embedding for entry in packed.data] == [e.embedding for e in plain.data]
        assert packed.data[0].embedding == packed.data[2].embedding != packed.data[1].embedding
        assert len(packed.data[0].embedding) == DIMENSIONS
        assert packed.model == "echo"
        assert packed.usage.prompt_tokens == packed.usage.total_tokens == 5
        short = await client.embeddings.create(model="echo", input="one two", dimensions=4)
        assert len(short.data[0].embedding) == 4
        await client.close()


async def test_an_answer_is_exactly_openais() -> None:
    async with serving(engine=embedder()) as served:
        document = await ask(served, EMBED, input="one", encoding_format="float")
        CreateEmbeddingResponse.model_validate(document, strict=True)
        assert document["object"] == "list"
        assert document["data"][0]["object"] == "embedding"
        packed = await ask(served, EMBED, input="one", encoding_format="base64")
        raw = base64.b64decode(packed["data"][0]["embedding"], validate=True)
        unpacked = struct.unpack(f"<{DIMENSIONS}f", raw)  # little-endian, whatever the machine is
        assert list(unpacked) == document["data"][0]["embedding"]


async def test_every_form_of_input_is_taken() -> None:
    async with serving(engine=embedder()) as served:

        async def vectors(**body: Any) -> list[Any]:
            return [entry["embedding"] for entry in (await ask(served, EMBED, **body))["data"]]

        (one,) = await vectors(input="one")
        assert await vectors(input=["one", "two"]) == [one, *await vectors(input="two")]
        ids = await served.http.post("/tokenize", json={"prompt": "one"})
        tokens = ids.json()["tokens"]
        assert await vectors(input=tokens) == [one]
        assert await vectors(input=[tokens, tokens]) == [one, one]
        messages = [{"role": "user", "content": "one"}]
        assert await vectors(messages=messages) == [one]
        assert await vectors(input=messages) == [one]
        assert await vectors(input="one two", truncate_prompt_tokens=1) == [one]
        assert await vectors(input="one", user="u", dimensions=None, encoding_format=None) == [one]


async def test_what_has_no_effect_is_told() -> None:
    async with serving(engine=embedder()) as served:
        body = {"input": "one", "user": "me", "input_type": "query"}
        response = await served.http.post(EMBED, json=body)
        assert response.headers["x-packhorse-ignored"] == "input_type, user"
        body = {"query": "one", "documents": [{"text": "one", "title": "t"}], "return_tokens": 1}
        response = await served.http.post(RERANK, json=body)
        assert response.headers["x-packhorse-ignored"] == "return_tokens, documents.title"


BAD: list[tuple[Any, str | None, str]] = [
    ({}, None, "send input or messages"),
    ({"input": []}, "input", "the list is empty"),
    ({"input": "one", "messages": [{"role": "user", "content": "x"}]}, None, "one of the two"),
    ({"input": ["one", ""]}, "input", "An input is empty"),
    ({"input": "one " * 3000}, "input", "has 3000"),
    ({"input": "one", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
    ({"input": "one", "dimensions": 99}, "dimensions", "dimensions=99"),
    ({"input": "one", "truncate_prompt_tokens": 0}, None, "leaves nothing"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}],
                }
            ]
        },
        None,
        "read text alone",
    ),
    ({"input": "one", "padding": "max_length"}, "padding", "not supported"),
    ({"input": "one", "encoding_format": "bytes"}, "encoding_format", "base64"),
    ({"input": ["one"] * 6}, "input", "6 inputs, above the limit of 5"),
    ({"input": "one", "timeout_s": 1e9}, "timeout_s", "timeout_s"),
]


async def test_a_bad_call_is_refused() -> None:
    async with serving(engine=embedder(), max_inputs=5) as served:
        for body, param, words in BAD:
            error = await refused(served, EMBED, **body)
            assert words in error["message"]
            assert error["param"] == param, words


async def test_one_bad_input_refuses_the_call_before_any_work() -> None:
    engine = Counting()
    async with serving(engine=engine) as served:
        error = await refused(served, EMBED, input=["one", "two", "w " * 3000])
        assert error["code"] == "context_length_exceeded"
        assert engine.seen == 0
        await until(nothing_left(served))


# Rerank and score


async def test_rerank_orders_documents() -> None:
    async with serving(engine=embedder()) as served:
        documents = ["three", "one two", {"text": "one"}]
        texts = ["three", "one two", "one"]
        answer = await ask(served, RERANK, model="echo", query="one", documents=documents)
        assert [entry["index"] for entry in answer["results"]] == [2, 1, 0]
        assert [entry["document"]["text"] for entry in answer["results"]] == texts[::-1]
        embedded = await ask(served, EMBED, input=["one", *texts])
        query, *others = (entry["embedding"] for entry in embedded["data"])
        for entry in answer["results"]:
            expected = cosine(query, others[entry["index"]])
            assert entry["relevance_score"] == pytest.approx(expected, abs=1e-6)
        assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
        best = await ask(
            served, "/v2/rerank", query="one", documents=texts, top_n=1, return_documents=False
        )
        ((entry,), meta) = best["results"], best["meta"]
        assert entry == {"index": 2, "relevance_score": pytest.approx(1.0)}
        assert meta == {
            "api_version": {"version": "2"},
            "tokens": {"input_tokens": 5, "output_tokens": 0},
        }


async def test_equal_documents_keep_their_order() -> None:
    async with serving(engine=embedder()) as served:
        answer = await ask(served, RERANK, query="one", documents=["two", "one", "one", "two"])
        assert [entry["index"] for entry in answer["results"]] == [1, 2, 0, 3]


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"),
                                   ("queries", "items"), ("data_1", "data_2")])  # fmt: skip
@pytest.mark.parametrize("make", [embedder, cross_encoder])
async def test_scores_of_pairs(names: tuple[str, str], make: Any) -> None:
    async with serving(engine=make()) as served:

        async def scores(one: Any, two: Any) -> list[float]:
            answer = await ask(served, "/score", **{names[0]: one, names[1]: two})
            assert [entry["object"] for entry in answer["data"]] == ["score"] * len(answer["data"])
            assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
            return [entry["score"] for entry in answer["data"]]

        same, other = await scores("one", ["one", "two"])
        assert same == pytest.approx(1.0)
        assert other < same
        assert await scores(["one", "two"], ["one", {"text": "two"}]) == pytest.approx([1.0, 1.0])
        assert await scores("one", "two") == [other]
        bad = await refused(served, "/score", **{names[0]: ["a", "b"], names[1]: ["a", "b", "c"]})
        assert "text_1 has 2 texts and text_2 has 3" in bad["message"]


async def test_a_cross_encoder_reads_pairs() -> None:
    async with serving(engine=cross_encoder()) as served:
        answer = await ask(
            served, RERANK, query="one two three four", documents=["nine", "one two", "two"]
        )
        found = [(entry["index"], entry["relevance_score"]) for entry in answer["results"]]
        assert found == [(1, 0.5), (2, 0.25), (0, 0.0)]
        assert answer["usage"]["total_tokens"] == 3 * 4 + 4
        error = await refused(served, RERANK, query="one", documents=["two", "w " * 3000])
        assert error["param"] == "documents"


async def test_limits_of_a_pair_are_for_cross_encoders() -> None:
    async with serving(engine=embedder()) as served:
        error = await refused(served, RERANK, query="one", documents=["two"], max_tokens_per_doc=8)
        assert error["param"] == "max_tokens_per_doc"
        assert "truncate_prompt_tokens" in error["message"]


async def test_more_documents_than_a_call_may_have_are_refused() -> None:
    for engine in (embedder(), cross_encoder()):
        async with serving(engine=engine, max_inputs=3) as served:
            await ask(served, RERANK, query="one", documents=["one"] * 3)
            error = await refused(served, RERANK, query="one", documents=["one"] * 4)
            assert "4 documents, above the limit of 3" in error["message"]
            assert error["param"] == "documents"


# Classify and pooling


async def test_classes_have_names_and_probabilities() -> None:
    async with serving(engine=cross_encoder()) as served:
        answer = await ask(served, "/classify", input=["one", "two"])
        assert answer["data"] == [
            {"index": index, "label": "relevant", "probs": [0.0], "num_classes": 1}
            for index in range(2)
        ]
        error = await refused(served, EMBED, input="one")
        assert "classify, token_classify" in error["message"]


async def test_pooling_gives_a_vector_a_token() -> None:
    async with serving(engine=embedder()) as served:
        (entry,) = (await ask(served, "/pooling", input="one two"))["data"]
        first, second = entry["data"]
        assert len(first) == len(second) == DIMENSIONS
        (whole,) = (await ask(served, "/pooling", input="one", task="embed"))["data"]
        assert whole["data"] == first
        (packed,) = (await ask(served, "/pooling", input="one", encoding_format="base64"))["data"]
        raw = base64.b64decode(packed["data"])
        assert list(struct.unpack(f"<{DIMENSIONS}f", raw)) == first
        error = await refused(served, "/pooling", input="one", task="classify")
        assert "this call needs classify" in error["message"]


# A model of the other kind


async def test_a_generating_model_refuses_and_tells_the_way_out() -> None:
    async with serving() as served:
        for path, body in CALLS.items():
            error = await refused(served, path, **body)
            assert "needs a pooling model" in error["message"], path
            assert error["param"] == "model"
        (card,) = (await served.http.get("/v1/models")).json()["data"]
        assert "runner" not in card


async def test_a_pooling_model_refuses_to_generate() -> None:
    async with serving(engine=embedder()) as served:
        chat = {"messages": [{"role": "user", "content": "one"}]}
        for path, body in ((CHAT, chat), (TEXT, {"prompt": "one"})):
            for stream in (False, True):
                error = await refused(served, path, **body, stream=stream)
                assert "/v1/embeddings" in error["message"]
        (card,) = (await served.http.get("/v1/models")).json()["data"]
        assert card["runner"] == "pooling"


# Keys, quotas, cache


async def test_every_endpoint_needs_a_key_with_its_scope(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.yaml", good={"scopes": ["inference"]}, other={"scopes": ["metrics"]}
    )
    async with serving(engine=embedder(), keys=keys) as served:
        for path, body in {**CALLS, "/classify": {"input": "x"}}.items():
            statuses = [
                (await served.http.post(path, json=body, headers=headers)).status_code
                for headers in ({}, bearer("nobody"), bearer("other"), bearer("good"))
            ]
            assert statuses == [401, 401, 403, 400 if path == "/classify" else 200], path


async def test_tokens_are_charged_to_the_key(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.yaml",
        few={"quotas": {"tokens_per_minute": 6}},
        rare={"quotas": {"requests_per_minute": 2}},
    )
    async with serving(engine=embedder(), keys=keys, clock=lambda: 100.0) as served:

        async def status(key: str, *texts: str) -> int:
            body = {"input": list(texts)}
            return (await served.http.post(EMBED, json=body, headers=bearer(key))).status_code

        assert await status("few", "one two", "three four") == 200
        assert await status("few", "one two three") == 429
        assert await status("few", "five six") == 200
        # A call is one request, however many inputs it has.
        assert await status("rare", *["one"] * 20) == 200
        assert await status("rare", "one") == 200
        assert await status("rare", "one") == 429


async def test_concurrent_calls_of_a_key_are_limited(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", one={"quotas": {"max_concurrent": 1}})
    engine = Counting()
    async with serving(engine=engine, keys=keys) as served:
        body = {"input": "slow one"}
        first = asyncio.create_task(served.http.post(EMBED, json=body, headers=bearer("one")))
        await until(lambda: engine.seen == 1)
        second = await served.http.post(EMBED, json={"input": "two"}, headers=bearer("one"))
        assert second.status_code == 429
        engine.go.set()
        assert (await first).status_code == 200


async def test_an_embedding_is_kept_for_its_tenant(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.yaml", a={"tenant": "x"}, b={"tenant": "x"}, c={"tenant": "y"}
    )
    engine = Counting()
    async with serving(engine=engine, keys=keys, cache=a_cache()) as served:

        async def mark(key: str, path: str = EMBED, /, **body: Any) -> tuple[str, Any]:
            response = await served.http.post(path, json=body, headers=bearer(key))
            assert response.status_code == 200, response.text
            return response.headers[MARK], response.json()

        missed, first = await mark("a", input="one two")
        hit, again = await mark("b", input="one two", encoding_format="float")
        assert (missed, hit) == ("miss", "hit")
        assert again["data"] == first["data"]
        assert again["usage"] == first["usage"]
        assert (await mark("c", input="one two"))[0] == "miss"
        assert (await mark("a", input="one two", dimensions=3))[0] == "miss"
        assert (await mark("a", input="one two", use_activation=False))[0] == "miss"
        assert (await mark("a", "/pooling", input="one two"))[0] == "miss"
        assert (await mark("a", input=["one two", "three"]))[0] == "hit, miss"
        assert (await mark("a", input="one two", cache={"mode": "off"}))[0] == "bypass"
        assert (await mark("a", input="one two", cache={"mode": "refresh"}))[0] == "miss"
        # Its query is known, its document not; afterwards both are.
        assert (await mark("a", RERANK, query="one two", documents=["new"]))[0] == "hit, miss"
        assert (await mark("a", RERANK, query="one two", documents=["new"]))[0] == "hit"


async def test_equal_inputs_share_one_computation() -> None:
    engine = Counting()
    async with serving(engine=engine, cache=a_cache()) as served:
        response = await served.http.post(EMBED, json={"input": ["one"] * 5})
        assert response.headers[MARK] == "coalesced, miss"
        assert engine.seen == 1
        # What is generated and what is embedded have nothing in common.
        await until(nothing_left(served))


async def test_pairs_are_told_apart_in_the_cache() -> None:
    async with serving(engine=cross_encoder(), cache=a_cache()) as served:

        async def mark(query: str, document: str) -> str:
            body = {"query": query, "documents": [document]}
            return (await served.http.post(RERANK, json=body)).headers[MARK]

        assert await mark("one two", "three") == "miss"
        assert await mark("one", "two three") == "miss"
        assert await mark("one two", "three") == "hit"


# Failures


async def test_a_dead_engine_is_told_and_leaves_nothing() -> None:
    async with serving(engine=embedder()) as served:
        response = await served.http.post(EMBED, json={"input": ["one", "!dead"]})
        assert response.status_code == 503
        assert response.json()["error"]["kind"] == "unavailable"
        response = await served.http.post(EMBED, json={"input": ["one", "!bug"]})
        assert response.status_code == 500
        await until(nothing_left(served))


async def test_a_client_that_leaves_ends_its_work() -> None:
    engine = Counting()
    async with serving(engine=engine) as served:
        asking = asyncio.create_task(
            served.http.post(EMBED, json={"input": ["slow one", "slow two"]})
        )
        await until(lambda: engine.seen == 2)
        asking.cancel()
        await until(nothing_left(served))


async def test_a_call_that_takes_too_long_is_ended() -> None:
    async with serving(engine=Counting()) as served:
        response = await served.http.post(EMBED, json={"input": "slow", "timeout_s": 0.1})
        assert response.status_code == 504
        await until(nothing_left(served))


async def test_texts_stay_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "packhorse.request")
    async with serving(engine=cross_encoder()) as served:
        await ask(served, RERANK, query="secretone", documents=["secrettwo"])
        await refused(served, RERANK, query="secretone", documents=["secrettwo " * 3000])
    assert "secret" not in caplog.text
    lines = request_lines(caplog)
    assert [line["outcome"] for line in lines] == ["ok", "invalid"]
    assert lines[0]["prompt_tokens"] == 2
    assert "secret" not in json.dumps(lines)


@pytest.mark.parametrize(("runner", "most"), [("pooling", 3072), ("generate", 384)])
async def test_a_whole_call_fits_beside_another(
    runner: Literal["pooling", "generate"], most: int
) -> None:
    """Of a model whose batches are smaller than the inputs of a call."""
    app = create(Settings(engine=EngineSettings(kind="echo", runner=runner)))
    await app.start()
    try:
        assert app.pipeline.max_inputs == 2048
        assert app.model.admission.max_in_engine == most
    finally:
        await app.stop()


VALUES: list[Any] = [
    None, True, -1, 0, 1, 10**9, 10**30, 1e308, 0.5, "", "x", [], {}, [[]], [None], [1, 2],
    [[1], ["x"]], {"text": 1}, [{"text": "x"}], [{"role": "user", "content": "\x00"}], "\x00",
    ["a"] * 40, [[-1]], [[10**12]], "base64", "left", "classify",
]  # fmt: skip
FIELDS = [
    "input", "messages", "query", "documents", "text_1", "text_2", "queries", "top_n", "model",
    "dimensions", "encoding_format", "task", "truncate_prompt_tokens", "truncation_side", "user",
    "return_documents", "max_tokens_per_doc", "cache", "cache_salt", "priority", "timeout_s",
    "use_activation", "add_special_tokens", "unheard_of",
]  # fmt: skip


@pytest.mark.parametrize("make", [embedder, cross_encoder])
async def test_no_odd_body_is_the_servers_fault(make: Any) -> None:
    """Over five hundred bodies for each kind of model."""
    rng = random.Random(0)
    statuses = []
    async with serving(engine=make(), cache=a_cache()) as served:
        for path, good in {**CALLS, "/classify": {"input": "one"}}.items():
            for _ in range(60):
                body = dict(good)
                for _ in range(rng.choice([1, 1, 2])):
                    body[rng.choice(FIELDS)] = rng.choice(VALUES)
                raw = bytearray(json.dumps(body).encode())
                if rng.random() < 0.2:
                    raw[rng.randrange(len(raw))] = rng.randrange(256)
                response = await served.http.post(path, content=bytes(raw))
                # A timeout of its own choice may be too short.
                assert response.status_code in (200, 400, 404, 504), (path, raw, response.text)
                if response.status_code == 200:
                    json.loads(response.content)
                statuses.append(response.status_code)
        await until(nothing_left(served))
    assert len(statuses) >= 500
    assert statuses.count(200) > 50
    assert statuses.count(400) > 150


async def test_the_openai_client_raises_its_own_errors() -> None:
    async with serving() as served:
        client = AsyncOpenAI(base_url=f"{served.listeners.url}/v1", api_key="none")
        with pytest.raises(openai.BadRequestError, match="pooling model"):
            await client.embeddings.create(model="echo", input="one")
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="other", input="one")
        await client.close()


@pytest.mark.parametrize(
    "options",
    [
        ("--phases", "fuzzing", "--max-examples", "10"),
        pytest.param(("--max-examples", "100"), marks=pytest.mark.thorough),
    ],
    ids=["some", "all"],
)
def test_every_answer_is_as_documented(tmp_path: Path, options: tuple[str, ...]) -> None:
    """By a pooling model; test_document.py asks one that generates, and refuses these calls."""
    environment = {"PACKHORSE_ENGINE__RUNNER": "pooling"}
    paths = "embeddings|rerank|score|classify|pooling|models"
    with running_server(tmp_path, "--engine", "echo", environment=environment) as server:
        check_document(server, tmp_path, *options, "--include-path-regex", paths)
