"""Embed and Rerank: messages of requests to the bodies of api/, answers to messages."""

from __future__ import annotations

from typing import Any

from packhorse.serve.api.embeddings import EmbeddingBody
from packhorse.serve.api.pooling import Pooled, floats
from packhorse.serve.api.rerank import RerankBody, ranked
from packhorse.serve.api.validation import validated
from packhorse.serve.rpc.pb import inference_pb2 as pb
from packhorse.serve.rpc.requests import prompts, sent_fields
from packhorse.serve.rpc.responses import usage_message


def embed_body(request: pb.EmbedRequest) -> EmbeddingBody:
    """Raises Invalid."""
    body = sent_fields(request, "model", "dimensions") | _options(request.options)
    if inputs := prompts(request.inputs, "inputs"):
        body["input"] = inputs
    return validated(body, EmbeddingBody)


def rerank_body(request: pb.RerankRequest) -> RerankBody:
    """Raises Invalid."""
    names = ("model", "query", "top_n", "return_documents")
    body = sent_fields(request, *names, "max_tokens_per_query", "max_tokens_per_doc")
    body |= _options(request.options) | {"documents": list(request.documents)}
    return validated(body, RerankBody)


def _options(options: pb.PoolingOptions) -> dict[str, Any]:
    return {
        field.name: sent_fields(value, "mode", "max_age_s") if field.name == "cache" else value
        for field, value in options.ListFields()
    }


def embed_response(pooled: Pooled, request_id: str) -> pb.EmbedResponse:
    head = pooled.head("embd-", request_id)
    return pb.EmbedResponse(
        id=head.id,
        created=head.created,
        model=head.model,
        embeddings=[
            pb.Embedding(index=index, values=floats(vectors))
            for index, vectors in enumerate(pooled.vectors)
        ],
        usage=usage_message(pooled.usage),
    )


def rerank_response(body: RerankBody, pooled: Pooled, request_id: str) -> pb.RerankResponse:
    head = pooled.head("rerank-", request_id)
    return pb.RerankResponse(
        id=head.id,
        model=head.model,
        results=[
            pb.RankedDocument(index=entry.index, relevance_score=entry.score, document=entry.text)
            for entry in ranked(body, body.scores(pooled))
        ],
        usage=usage_message(pooled.usage),
    )
