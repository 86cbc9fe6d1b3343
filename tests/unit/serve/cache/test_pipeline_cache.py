"""The pipeline with a result cache, on the echo engine: what is shared, what is not, who pays."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.serve.cache import render_cache
from packhorse.serve.errors import ServeError
from tests.unit.serve.cache.caching_pipeline import Clock, answer, make, read
from tests.unit.serve.cache.making import ask


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
async def test_one_result_serves_streams_and_whole_answers(first: bool, second: bool) -> None:
    pipeline, engine = make()
    assert await answer(pipeline, ask("a b c", stream=first)) == ("miss", "a b c")
    stream = await pipeline.start(ask("a b c", stream=second))
    assert (stream.context.cache_status, await read(stream)) == ("hit", "a b c")
    assert (stream.context.usage.prompt_tokens, stream.context.usage.completion_tokens) == (3, 3)
    assert engine.generations == 1
    assert pipeline.models.first.admission.running == 0
    assert await pipeline.drain(10)


@pytest.mark.parametrize(
    "other",
    [
        {"text": "a b d"},
        {"tenant": "other"},
        {"max_tokens": 2},
        {"stop": ("x",)},
        {"n": 2},
        {"logprobs": 1},
    ],
    ids=str,
)
async def test_another_request_is_another_result(other: dict[str, Any]) -> None:
    pipeline, engine = make()
    await answer(pipeline, ask("a b c"))
    mark, _ = await answer(pipeline, ask(**{"text": "a b c", **other}))
    assert (mark, engine.generations) == ("miss", 2)


async def test_sampled_answers_are_not_kept() -> None:
    pipeline, engine = make()
    for _ in range(2):
        assert (await answer(pipeline, ask(temperature=0.7)))[0] == "bypass"
    for _ in range(2):
        await answer(pipeline, ask(temperature=None))  # 1.0, by this engine
    assert engine.generations == 4
    marks = [(await answer(pipeline, ask(temperature=0.7, seed=3)))[0] for _ in range(2)]
    assert marks == ["miss", "hit"]
    always = ask(temperature=0.7, mode="always")
    assert [(await answer(pipeline, always))[0] for _ in range(2)] == ["miss", "hit"]


async def test_the_callers_policy() -> None:
    clock = Clock()
    pipeline, engine = make(clock=clock)

    async def mark(**policy: Any) -> str:
        return (await answer(pipeline, ask(**policy)))[0]

    assert await mark(mode="off") == "bypass"
    assert await mark() == "miss", "it was not kept"
    clock.now_s += 10
    assert await mark(max_age_s=10) == "hit"
    assert await mark(max_age_s=9) == "miss"
    assert await mark(max_age_s=9) == "hit", "the fresh one was kept"
    clock.now_s += 10
    assert await mark(mode="refresh") == "miss"
    assert await mark(max_age_s=0.5) == "hit"
    clock.now_s += 61
    assert await mark() == "miss", "older than the server keeps them"
    assert engine.generations == 5


async def test_errors_are_not_kept() -> None:
    pipeline, engine = make()
    for _ in range(2):
        with pytest.raises(ServeError):
            await pipeline.start(ask("!dead"))
        stream = await pipeline.start(ask("!dead-later", stream=True))
        with pytest.raises(ServeError):
            await read(stream)
    assert engine.generations >= 4
    assert await pipeline.drain(10)


async def test_large_results_are_not_kept() -> None:
    pipeline, _ = make(max_entry_bytes=50)
    counted = pipeline.models.first.metrics.cache_stores.labels("too_large")
    before = counted._value.get()
    marks = [(await answer(pipeline, ask("word " * 100)))[0] for _ in range(2)]
    assert marks == ["miss", "miss"]
    assert counted._value.get() == before + 2


async def test_another_engine_is_another_model() -> None:
    pipeline, engine = make()
    await answer(pipeline, ask())
    pipeline.models.first.cache.fingerprint = b"another"  # type: ignore[attr-defined]
    assert (await answer(pipeline, ask()))[0] == "miss"
    assert engine.generations == 2


async def test_what_two_engines_answered_is_not_kept() -> None:
    """An engine that was replaced on the way may have answered, or the one that came after it."""
    pipeline, engine = make(0.05)
    stream = await pipeline.start(ask("a b c", stream=True))
    pipeline.models.first.cache.fingerprint = b"another"  # type: ignore[attr-defined]
    assert await read(stream) == "a b c"
    pipeline.models.first.cache.fingerprint = b"model"  # type: ignore[attr-defined]
    assert (await answer(pipeline, ask("a b c")))[0] == "miss"
    assert engine.generations == 2


async def test_requests_that_the_models_defaults_sample_pay_for_no_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of them tells that the defaults sample; greedy and seeded ones are looked up as ever."""
    digests = 0
    content_of = render_cache.content_of

    def counted(*arguments: Any) -> bytes:
        nonlocal digests
        digests += 1
        return content_of(*arguments)

    monkeypatch.setattr(render_cache, "content_of", counted)
    pipeline, engine = make()
    for _ in range(5):
        assert await answer(pipeline, ask("a b", temperature=None)) == ("bypass", "a b")
    assert (digests, engine.generations) == (1, 5)
    for fields in ({"temperature": 0.0}, {"temperature": None, "seed": 7}):
        marks = [(await answer(pipeline, ask("a b", **fields)))[0] for _ in range(2)]
        assert marks == ["miss", "hit"]
    pipeline.models.first.cache.fingerprint = b"another engine"  # type: ignore[attr-defined]
    before = digests
    for _ in range(5):
        assert await answer(pipeline, ask("a b", temperature=None)) == ("bypass", "a b")
    assert digests == before + 1


async def test_a_full_server_answers_from_the_cache_and_renders_nothing() -> None:
    pipeline, engine = make(limits={"max_in_engine": 1})
    assert await answer(pipeline, ask("a b")) == ("miss", "a b")
    busy = await pipeline.start(ask("c d", stream=True))
    rendered = len(engine.salts)
    for text in ("e f", "g h"):
        with pytest.raises(ServeError, match="answers to write"):
            await pipeline.start(ask(text, temperature=0.5))
    assert len(engine.salts) == rendered
    for _ in range(3):  # its answer might be kept, which takes a prompt to find out, once
        with pytest.raises(ServeError, match="answers to write"):
            await pipeline.start(ask("e f"))
    assert len(engine.salts) == rendered + 1
    assert await answer(pipeline, ask("a b")) == ("hit", "a b")
    assert await read(busy) == "c d"
    assert await answer(pipeline, ask("e f")) == ("miss", "e f")
    assert await pipeline.drain(10)
