"""Pooling requests below the protocols: replayed and found to be poison as others are, kept in the
stores, and told apart by all that decides a vector.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from packhorse.serve.api.pooling import Pooled, classes, floats, rows
from packhorse.serve.api.rerank import RerankBody, ScoreBody
from packhorse.serve.cache.codec import Result, decode, encode
from packhorse.serve.cache.key import content_of, is_repeatable, rendering_of
from packhorse.serve.engines.base import check_kind, pooling_task
from packhorse.serve.engines.echo import DIMENSIONS, EchoEngine
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import (
    Chunk,
    GenerateRequest,
    Pooler,
    Pooling,
    Prompt,
    Route,
    Sampling,
    Vectors,
)
from packhorse.serve.settings.engine import EngineSettings
from tests.unit.serve.test_supervisor import ROUTE, Mortal, Works

EMBED = Pooling("embed")
SETTINGS = EngineSettings(kind="echo", runner="pooling", echo_delay_s=0.01)


def ask(text: str, pooling: Pooling | None = EMBED) -> GenerateRequest:
    return GenerateRequest("id", "echo", Sampling(), prompt=text, pooling=pooling)


class MortalPooler(Mortal):
    """Dies of texts that begin with `poison`."""

    def __init__(self) -> None:
        super().__init__()
        EchoEngine.__init__(self, SETTINGS)

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        if str(request.prompt).startswith("poison"):
            asyncio.get_running_loop().call_later(0.005, self.die)
        async for chunk in super().generate(prompt, request, route):
            yield chunk


@pytest.mark.usefixtures("checked_often")
async def test_a_request_is_replayed_and_poison_is_found() -> None:
    works = Works(make=MortalPooler)
    supervisor = await works.supervisor()
    try:
        assert supervisor.pooler == Pooler("bi-encoder")

        async def vectors(text: str) -> Vectors | None:
            request = ask(text)
            prompt = await supervisor.render(request, ROUTE)
            (chunk,) = [c async for c in supervisor.generate(prompt, request, ROUTE)]
            return chunk.vectors

        innocent = asyncio.create_task(vectors("one two"))
        await asyncio.sleep(0)
        works.engines[0].die()
        found = await innocent  # from the second engine
        assert found is not None
        assert len(floats(found)) == DIMENSIONS
        with pytest.raises(Invalid, match="only suspect"):
            await vectors("poison one")
        died = len(works.engines)
        with pytest.raises(Invalid, match="only suspect"):
            await vectors("poison one")
        assert len(works.engines) == died
    finally:
        await supervisor.close()


def test_all_that_decides_a_vector_is_in_the_key() -> None:
    prompt = Prompt((1, 2), 0)
    variants = [
        None, EMBED, Pooling("token_embed"), Pooling("classify", pair="a"),
        Pooling("classify", pair="b"), replace(EMBED, dimensions=3),
        replace(EMBED, use_activation=False), replace(EMBED, truncation_side="left"),
        replace(EMBED, max_tokens_per_query=3), replace(EMBED, max_tokens_per_doc=3),
    ]  # fmt: skip
    assert len({content_of(ask("a", pooling), prompt) for pooling in variants}) == len(variants)
    assert len({rendering_of(ask("a", pooling)) for pooling in variants}) == len(variants)
    # What errors call the field decides nothing.
    named = replace(EMBED, param="query")
    assert content_of(ask("a", named), prompt) == content_of(ask("a"), prompt)
    assert is_repeatable(ask("a"), prompt)
    assert not is_repeatable(ask("a", None), prompt)


def test_vectors_survive_a_store() -> None:
    data = struct.pack("<4f", 0.1, -2.0, 3e-8, 4.0)
    for vectors in (Vectors(data), Vectors(data, 2)):
        result = Result((Chunk("", (), "stop", vectors=vectors),), 1.0)
        assert decode(encode(result)).chunks[0].vectors == vectors


def test_rows_are_those_of_tokens() -> None:
    data = struct.pack("<4f", 1, 2, 3, 4)
    assert rows(Vectors(data, 2)) == [[1, 2], [3, 4]]
    assert rows(Vectors(data)) == [[1, 2, 3, 4]]
    assert rows(Vectors(b"")) == []


def test_a_late_interaction_model_sums_best_matches() -> None:
    query = Vectors(struct.pack("<4f", 1, 0, 0, 1), 2)
    document = Vectors(struct.pack("<6f", 0.5, 0.25, 0, 2, 0.75, 0), 3)
    body = ScoreBody(text_1="a b", text_2="c d e")
    assert body.scores(Pooled([], [query, document])) == [0.75 + 2]


def test_a_text_without_a_direction_has_no_cosine() -> None:
    nothing, something = Vectors(struct.pack("<2f", 0, 0)), Vectors(struct.pack("<2f", 3, 4))
    body = RerankBody(query="a", documents=["b", "c"])
    scores = body.scores(Pooled([], [something, nothing, something]))
    assert scores == [0.0, pytest.approx(1.0)]


async def test_a_class_without_a_name_has_none() -> None:
    class Stream:
        """What `classes` reads of one."""

        engine = EchoEngine(SETTINGS)

    stream = Stream()
    stream.engine.pooler = Pooler(None, ("good", ""))
    likely = ((0.5, 0.25, 0.25), (0, 1, 0), (0, 0, 1))
    vectors = [Vectors(struct.pack("<3f", *row)) for row in likely]
    found = classes(Pooled([stream] * 3, vectors))  # type: ignore[list-item]
    assert [one.label for one in found] == ["good", None, None]


def test_a_task_is_the_models() -> None:
    assert pooling_task(ask("a"), ["embed", "token_embed"]) == "embed"
    assert pooling_task(ask("a", Pooling()), ["classify", "token_classify"]) == "token_classify"
    with pytest.raises(Invalid, match="are classify, and this call needs embed"):
        pooling_task(ask("a"), ["classify"])


def test_kinds_of_models_are_told_apart() -> None:
    generating, pooling = EchoEngine(EngineSettings(kind="echo")), EchoEngine(SETTINGS)
    check_kind(generating, ask("a", None))
    check_kind(pooling, ask("a"))
    for engine, request in ((generating, ask("a")), (pooling, ask("a", None))):
        with pytest.raises(Invalid) as refused:
            check_kind(engine, request)
        assert refused.value.param == "model"
