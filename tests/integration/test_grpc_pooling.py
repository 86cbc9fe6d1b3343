"""Embed and Rerank over gRPC: the answers, refusals and metadata of HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from packhorse.serve.rpc.pb import inference_pb2 as pb
from tests.integration.grpc_serving import Twins, twins
from tests.integration.pooling import EMBED, RERANK, cross_encoder, embedder
from tests.integration.serving import nothing_left, until, write_keys
from tests.protocol_parity import Failed, failed_in_grpc, metadata, method

ANSWERS: dict[str, Any] = {
    "Embed": pb.EmbedResponse,
    "Rerank": pb.RerankResponse,
    "ListModels": pb.ListModelsResponse,
    "Chat": pb.ChatResponse,
}


async def call(served: Twins, name: str, message: Any, **headers: str) -> Any:
    """The answer and its trailers, or the error."""
    sent = method(served.channel, name, ANSWERS[name])(message, metadata=metadata(headers))
    try:
        return await sent, dict(await sent.trailing_metadata())
    except grpc.aio.AioRpcError as error:
        return failed_in_grpc(error), {}


async def failed(served: Twins, path: str, body: dict[str, Any]) -> Failed:
    found = await served.ask_http(path, body)
    assert isinstance(found, Failed)
    return found


async def test_embeddings_are_those_of_http() -> None:
    async with twins(engine=embedder(), cache=True) as served:
        texts = ["one two", "three"]
        inputs = [pb.Prompt(text=text) for text in texts]
        answer, trailers = await call(served, "Embed", pb.EmbedRequest(model="echo", inputs=inputs))
        assert trailers["x-packhorse-cache"] == "miss"
        response = await served.served.http.post(EMBED, json={"input": texts})
        document = response.json()
        assert response.headers["x-packhorse-cache"] == "hit"  # of what gRPC has asked
        assert [list(entry.values) for entry in answer.embeddings] == [
            entry["embedding"] for entry in document["data"]
        ]
        assert [entry.index for entry in answer.embeddings] == [0, 1]
        assert answer.id.startswith("embd-")
        assert answer.model == document["model"] == "echo"
        assert answer.created
        assert answer.usage.prompt_tokens == document["usage"]["prompt_tokens"] == 3
        tokens = (await served.served.http.post("/tokenize", json={"prompt": "three"})).json()
        ids = pb.Prompt(token_ids=pb.TokenIds(ids=tokens["tokens"]))
        again, trailers = await call(served, "Embed", pb.EmbedRequest(inputs=[ids], dimensions=16))
        assert list(again.embeddings[0].values) == list(answer.embeddings[1].values)


@pytest.mark.parametrize("make", [embedder, cross_encoder])
async def test_ranks_are_those_of_http(make: Any) -> None:
    async with twins(engine=make()) as served:
        documents = ["three", "one two", "one"]
        message = pb.RerankRequest(model="echo", query="one two", documents=documents)
        answer, _ = await call(served, "Rerank", message)
        body = {"query": "one two", "documents": documents}
        document = (await served.served.http.post(RERANK, json=body)).json()
        assert [
            {
                "index": entry.index,
                "document": {"text": entry.document},
                "relevance_score": entry.relevance_score,
            }
            for entry in answer.results
        ] == document["results"]
        assert answer.usage.total_tokens == document["usage"]["total_tokens"]
        message.top_n, message.return_documents = 1, False
        best, _ = await call(served, "Rerank", message)
        assert len(best.results) == 1
        assert not best.results[0].HasField("document")


CASES: list[tuple[str, Any, str, dict[str, Any]]] = [
    ("Embed", pb.EmbedRequest(), EMBED, {}),
    ("Embed", pb.EmbedRequest(inputs=[pb.Prompt(text="")]), EMBED, {"input": ""}),
    (
        "Embed",
        pb.EmbedRequest(inputs=[pb.Prompt(text="a")], dimensions=99),
        EMBED,
        {"input": "a", "dimensions": 99},
    ),
    (
        "Embed",
        pb.EmbedRequest(inputs=[pb.Prompt(text="a")] * 4),
        EMBED,
        {"input": ["a"] * 4},
    ),
    (
        "Embed",
        pb.EmbedRequest(model="other", inputs=[pb.Prompt(text="a")]),
        EMBED,
        {"model": "other", "input": "a"},
    ),
    (
        "Embed",
        pb.EmbedRequest(
            inputs=[pb.Prompt(text="a")], options=pb.PoolingOptions(truncation_side="up")
        ),
        EMBED,
        {"input": "a", "truncation_side": "up"},
    ),
    ("Rerank", pb.RerankRequest(query="a"), RERANK, {"query": "a", "documents": []}),
    (
        "Rerank",
        pb.RerankRequest(query="a", documents=["b"] * 4),
        RERANK,
        {"query": "a", "documents": ["b"] * 4},
    ),
    (
        "Rerank",
        pb.RerankRequest(query="a", documents=["b"], max_tokens_per_doc=3),
        RERANK,
        {"query": "a", "documents": ["b"], "max_tokens_per_doc": 3},
    ),
]


async def test_refusals_are_those_of_http() -> None:
    async with twins(engine=embedder(), max_inputs=3) as served:
        for name, message, path, body in CASES:
            over_grpc, _ = await call(served, name, message)
            assert isinstance(over_grpc, Failed), message
            over_http = await failed(served, path, body)
            assert over_grpc.message == over_http.message
            assert (over_grpc.kind, over_grpc.param) == (over_http.kind, over_http.param)
        await until(nothing_left(served.served))


async def test_text_and_token_ids_do_not_mix() -> None:
    async with twins(engine=embedder()) as served:
        mixed = [pb.Prompt(text="a"), pb.Prompt(token_ids=pb.TokenIds(ids=[1]))]
        found, _ = await call(served, "Embed", pb.EmbedRequest(inputs=mixed))
        assert isinstance(found, Failed)
        assert found.param == "inputs"


async def test_models_of_the_other_kind_are_refused() -> None:
    async with twins() as served:
        request = pb.EmbedRequest(inputs=[pb.Prompt(text="a")])
        found, _ = await call(served, "Embed", request)
        assert "needs a pooling model" in found.message
        found, _ = await call(served, "Rerank", pb.RerankRequest(query="a", documents=["b"]))
        assert "needs a pooling model" in found.message
        listed, _ = await call(served, "ListModels", pb.ListModelsRequest())
        assert listed.models[0].runner == "generate"
    async with twins(engine=embedder()) as served:
        chat = pb.ChatRequest(messages=[pb.Message(role="user", content="a")])
        found, _ = await call(served, "Chat", chat)
        assert "/v1/embeddings" in found.message
        listed, _ = await call(served, "ListModels", pb.ListModelsRequest())
        assert listed.models[0].runner == "pooling"


async def test_keys_and_quotas_hold(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.yaml",
        few={"quotas": {"requests_per_minute": 1}},
        other={"scopes": ["metrics"]},
    )
    async with twins(engine=embedder(), keys=keys) as served:
        request = pb.EmbedRequest(inputs=[pb.Prompt(text="a")])

        async def kind(key: str) -> str:
            found, _ = await call(served, "Embed", request, authorization=f"Bearer key-{key}")
            return found.kind if isinstance(found, Failed) else "ok"

        assert [await kind("nobody"), await kind("other")] == ["unauthenticated", "forbidden"]
        assert [await kind("few"), await kind("few")] == ["ok", "overloaded"]
