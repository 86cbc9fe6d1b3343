"""The calls on pooling models: /v1/embeddings, /rerank, /score, /classify, /pooling, under all the
paths that OpenAI's, Cohere's, Jina's and vLLM's clients use.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response

from packhorse.serve.api.embeddings import EmbeddingBody
from packhorse.serve.api.generate import CallContext, RefusalsCounted, answer_metadata
from packhorse.serve.api.pooling import (
    ClassifyBody,
    PoolBody,
    Pooled,
    PoolingBody,
    classes,
    floats,
    pool,
    rows,
)
from packhorse.serve.api.rerank import RerankBody, ScoreBody, ranked
from packhorse.serve.messages import Vectors
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.rest.generate import PlainRoute, cache_policy, timeout_of
from packhorse.serve.rest.openapi import body_document, documented
from packhorse.serve.rest.requests import BodyLimits, ClientWatch, read_body
from packhorse.serve.settings.http import HttpSettings

Body = TypeVar("Body", bound=PoolingBody)
Encode = Callable[[Body, Pooled, str], dict[str, Any]]


def routes(pipeline: Pipeline, settings: HttpSettings) -> APIRouter:
    """The endpoints over one pipeline."""
    router = APIRouter(route_class=PlainRoute)
    limits = BodyLimits(settings, pipeline.admission.bodies)

    async def respond(request: Request, kind: type[Body], encode: Encode[Body]) -> Response:
        state = request.state
        with RefusalsCounted(pipeline, state.request_id, state.caller):
            body = await read_body(request, kind, limits, settings.unknown_fields)
            context = CallContext(
                state.request_id,
                state.caller,
                timeout_of(request, body.timeout_s),
                cache_policy(request, body.cache),
                getattr(state, "trace", None),
            )
            requests = body.to_requests(pipeline, context)
        async with ClientWatch(request.scope, request.receive):
            pooled = await pool(pipeline, requests)
        # json.dumps takes five times as long for many floats.
        content = await asyncio.to_thread(
            lambda: msgspec.json.encode(encode(body, pooled, state.request_id))
        )
        headers = answer_metadata(pipeline, pooled.streams)
        return Response(content, headers=headers, media_type="application/json")

    def post(path: str, kind: type[Body], encode: Encode[Body], answer: str) -> None:
        """Add one endpoint. Other paths of it are not in the OpenAPI document."""

        async def endpoint(request: Request) -> Response:
            return await respond(request, kind, encode)

        endpoint.__name__ = path.strip("/").replace("/", "_")
        router.post(
            path,
            responses=documented(answer),
            openapi_extra=body_document(kind),
            include_in_schema=path not in OTHER_PATHS,
        )(endpoint)

    for path in ("/v1/embeddings", "/embeddings"):
        post(path, EmbeddingBody, embedded, "Embeddings")
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        post(path, RerankBody, reranked, "Ranking")
    for path in ("/score", "/v1/score"):
        post(path, ScoreBody, scored, "Scores")
    for path in ("/classify", "/v1/classify"):
        post(path, ClassifyBody, classified, "Classes")
    for path in ("/pooling", "/v1/pooling"):
        post(path, PoolBody, pooled_vectors, "Vectors")
    return router


# Names of the same endpoints, which the OpenAPI document leaves out.
OTHER_PATHS = {
    "/embeddings", "/rerank", "/v2/rerank", "/v1/score", "/v1/classify", "/v1/pooling",
}  # fmt: skip


def _list(id_prefix: str, pooled: Pooled, request_id: str) -> dict[str, Any]:
    """The document around the data of OpenAI's and vLLM's form."""
    head = pooled.head(id_prefix, request_id)
    return {
        "id": head.id,
        "object": "list",
        "created": head.created,
        "model": head.model,
        "data": [],
        "usage": _usage(pooled),
    }


def _usage(pooled: Pooled) -> dict[str, int]:
    tokens = pooled.usage.prompt_tokens
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _base64(vectors: Vectors) -> str:
    return base64.b64encode(vectors.data).decode()


def embedded(body: EmbeddingBody, pooled: Pooled, request_id: str) -> dict[str, Any]:
    encode: Callable[[Vectors], Any] = _base64 if body.encoding_format == "base64" else floats
    return _list("embd-", pooled, request_id) | {
        "data": [
            {"index": index, "object": "embedding", "embedding": encode(vectors)}
            for index, vectors in enumerate(pooled.vectors)
        ]
    }


def pooled_vectors(body: PoolBody, pooled: Pooled, request_id: str) -> dict[str, Any]:
    def encode(vectors: Vectors) -> Any:
        if body.encoding_format == "base64":
            return _base64(vectors)
        return floats(vectors) if vectors.rows is None else rows(vectors)

    return _list("pool-", pooled, request_id) | {
        "data": [
            {"index": index, "object": "pooling", "data": encode(vectors)}
            for index, vectors in enumerate(pooled.vectors)
        ]
    }


def classified(_: ClassifyBody, pooled: Pooled, request_id: str) -> dict[str, Any]:
    return _list("classify-", pooled, request_id) | {
        "data": [
            {
                "index": index,
                "label": found.label,
                "probs": found.probabilities,
                "num_classes": len(found.probabilities),
            }
            for index, found in enumerate(classes(pooled))
        ]
    }


def scored(body: ScoreBody, pooled: Pooled, request_id: str) -> dict[str, Any]:
    return _list("score-", pooled, request_id) | {
        "data": [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(body.scores(pooled))
        ]
    }


def reranked(body: RerankBody, pooled: Pooled, request_id: str) -> dict[str, Any]:
    """Jina's and vLLM's form, with Cohere's `meta` beside it."""
    head = pooled.head("rerank-", request_id)
    usage = _usage(pooled)
    return {
        "id": head.id,
        "model": head.model,
        "usage": usage,
        "results": [
            {
                "index": entry.index,
                **({} if entry.text is None else {"document": {"text": entry.text}}),
                "relevance_score": entry.score,
            }
            for entry in ranked(body, body.scores(pooled))
        ],
        "meta": {
            "api_version": {"version": "2"},
            "tokens": {"input_tokens": usage["prompt_tokens"], "output_tokens": 0},
        },
    }
