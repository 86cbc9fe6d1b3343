"""Scores of pairs of texts: /score, and rerank, which orders documents by theirs.

A cross-encoder reads a query and a document together. Any other embedding model reads each text
once: the score is the cosine of two embeddings (bi-encoder), or the sum over the query's tokens of
each one's best product with a token of the document (late interaction, MaxSim; Khattab and Zaharia,
arXiv:2004.12832).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from packhorse.serve.api.generate import CallContext
from packhorse.serve.api.pooling import Pooled, PoolingBody, floats, numbered
from packhorse.serve.api.validation import LenientBody, Unsupported
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import GenerateRequest, Pooling, PoolingTask, ScoreType, Vectors
from packhorse.serve.pipeline import Pipeline


class Document(LenientBody):
    """A document of Cohere's or Jina's form. Other fields than its text are not read."""

    text: str


Text = str | Document
Documents = Annotated[list[Text], Field(fail_fast=True, min_length=1)]


def text_of(given: Text) -> str:
    return given if isinstance(given, str) else given.text


class PairBody(PoolingBody):
    """The fields that /score and rerank share."""

    unsupported: ClassVar = {
        **PoolingBody.unsupported,
        "instruction": Unsupported((), "put it into the query"),
        "chat_template_kwargs": Unsupported(({},), "put the text into the query"),
        "rank_fields": Unsupported(([], ["text"]), "put the fields' text into each document"),
    }

    max_tokens_per_query: int | None = Field(None, ge=0)
    max_tokens_per_doc: int | None = Field(None, ge=0)

    def pairs(self) -> tuple[list[str], list[str], tuple[str, str]]:
        """The first texts (one, or as many as the second), the second ones, and the fields' names.
        Raises Invalid.
        """
        raise NotImplementedError

    def to_requests(self, pipeline: Pipeline, context: CallContext) -> list[GenerateRequest]:
        request = self.request(pipeline, context)
        queries, documents, (query_param, document_param) = self.pairs()
        pooler = pipeline.models.of(request.model, context.caller).engine.pooler
        # A model that generates is refused in the pipeline, as for every call.
        score_type: ScoreType | None = "bi-encoder" if pooler is None else pooler.score_type
        if score_type is None:
            raise Invalid(
                f"The model {request.model[:80]!r} has classes and no score for a pair; call "
                "/classify, or serve an embedding model or a cross-encoder.",
                param="model",
            )
        if len(documents) > pipeline.max_inputs:  # before the pairs are made
            raise Invalid(
                f"This call has {len(documents)} documents, above the limit of "
                f"{pipeline.max_inputs}; send several calls.",
                param=document_param,
            )
        if score_type == "cross-encoder":
            everywhere = queries * len(documents) if len(queries) == 1 else queries
            inputs = [
                (query, self._pooling(document_param, pair=document))
                for query, document in zip(everywhere, documents, strict=True)
            ]
            return numbered(request, inputs, pipeline.max_inputs)
        self._refuse_limits_of_pairs()
        task: PoolingTask = "embed" if score_type == "bi-encoder" else "token_embed"
        inputs = [
            (text, Pooling(task, truncation_side=self.truncation_side, param=param))
            for texts, param in ((queries, query_param), (documents, document_param))
            for text in texts
        ]
        return numbered(request, inputs, len(inputs))

    def _pooling(self, param: str, *, pair: str) -> Pooling:
        return Pooling(
            "classify",
            pair,
            use_activation=self.use_activation,
            truncation_side=self.truncation_side,
            max_tokens_per_query=self.max_tokens_per_query,
            max_tokens_per_doc=self.max_tokens_per_doc,
            param=param,
        )

    def _refuse_limits_of_pairs(self) -> None:
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            if getattr(self, name):
                raise Invalid(
                    f"{name} is for cross-encoders, and this model embeds each text by itself; "
                    "send truncate_prompt_tokens.",
                    param=name,
                )

    def scores(self, pooled: Pooled) -> list[float]:
        """One a pair, in order."""
        queries, documents, _ = self.pairs()
        if len(pooled.vectors) == len(documents):  # a cross-encoder's: pairs
            return [floats(vectors)[0] for vectors in pooled.vectors]
        first, second = pooled.vectors[: len(queries)], pooled.vectors[len(queries) :]
        everywhere = first * len(second) if len(first) == 1 else first
        return [_similarity(a, b) for a, b in zip(everywhere, second, strict=True)]


def _similarity(query: Vectors, document: Vectors) -> float:
    if query.rows is not None:
        return _max_sim(query, document)
    a, b = floats(query), floats(document)
    lengths = math.sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))
    return sum(map(mul, a, b)) / lengths if lengths else 0.0


def _max_sim(query: Vectors, document: Vectors) -> float:
    import numpy as np  # only the engine's dependencies bring it, and only they make such vectors

    q_TD, d_TD = (
        np.frombuffer(each.data, "<f4").reshape(each.rows or 1, -1) for each in (query, document)
    )
    return float((q_TD @ d_TD.T).max(axis=1).sum())


class RerankBody(PairBody):
    """POST /rerank, /v1/rerank, /v2/rerank: Cohere's, Jina's and vLLM's fields."""

    no_effect: ClassVar = frozenset(("user", "max_chunks_per_doc"))

    query: Text
    documents: Documents
    top_n: int | None = Field(None, ge=0)
    """None and 0: all."""
    return_documents: bool = True
    max_chunks_per_doc: Any = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """One document stands for a list of one."""
        given = document.get("documents")
        return {**document, "documents": [given]} if isinstance(given, str | dict) else document

    def texts(self) -> list[str]:
        return list(map(text_of, self.documents))

    def pairs(self) -> tuple[list[str], list[str], tuple[str, str]]:
        return [text_of(self.query)], self.texts(), ("query", "documents")


@dataclass(frozen=True, slots=True)
class Ranked:
    """One document of an answer."""

    index: int
    """Its place in the request."""
    score: float
    text: str | None
    """None unless the documents are wanted back."""


def ranked(body: RerankBody, scores: Sequence[float]) -> list[Ranked]:
    """The best documents first; equal ones as they were sent."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    texts = body.texts() if body.return_documents else None
    return [
        Ranked(index, scores[index], texts[index] if texts else None)
        for index in order[: body.top_n or None]
    ]


# The names that vLLM takes for the two sides of a pair.
SIDES = (
    ("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"),
)  # fmt: skip


class ScoreBody(PairBody):
    """POST /score, /v1/score: 1 to 1, 1 to N or N to N texts."""

    unsupported: ClassVar = {
        name: known for name, known in PairBody.unsupported.items() if name != "data"
    }

    text_1: Text | Documents
    text_2: Text | Documents

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """vLLM's other names for the two sides."""
        for one, two in SIDES[1:]:
            if document.get(one) is not None and document.get(two) is not None:
                kept = {name: value for name, value in document.items() if name not in (one, two)}
                return {**kept, "text_1": document[one], "text_2": document[two]}
        return document

    @model_validator(mode="after")
    def _belong_together(self) -> ScoreBody:
        one, two = (
            len(side) if isinstance(side, list) else 1 for side in (self.text_1, self.text_2)
        )
        if one not in (1, two):
            raise ValueError(
                f"text_1 has {one} texts and text_2 has {two}; send one text_1, or one for each "
                "text_2"
            )
        return self

    def pairs(self) -> tuple[list[str], list[str], tuple[str, str]]:
        one, two = (
            list(map(text_of, side if isinstance(side, list) else [side]))
            for side in (self.text_1, self.text_2)
        )
        return one, two, ("text_1", "text_2")
