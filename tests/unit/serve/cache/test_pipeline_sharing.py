"""The pipeline with a result cache: who shares a generation, who takes over, and who pays."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from packhorse.serve.cache.codec import Result, encode, seal
from packhorse.serve.cache.key import Key
from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.errors import Cancelled, EngineDied, Invalid, Overloaded, ServeError
from packhorse.serve.messages import Chunk
from tests.client import request_lines
from tests.unit.serve.cache.caching_pipeline import Clock, answer, make, read
from tests.unit.serve.cache.making import ask, caller, settled


async def test_64_equal_requests_make_one_generation() -> None:
    pipeline, engine = make(0.01)
    saved = pipeline.models.first.metrics.cache_saved_tokens._value.get()
    found = await asyncio.gather(
        *(answer(pipeline, ask("a b c", stream=number % 2 == 0)) for number in range(64))
    )
    assert engine.generations == 1
    assert {text for _, text in found} == {"a b c"}
    assert Counter(mark for mark, _ in found) == {"miss": 1, "coalesced": 63}
    assert pipeline.models.first.metrics.cache_saved_tokens._value.get() == saved + 63 * 3
    assert await pipeline.drain(10)


async def test_64_sampled_requests_make_64() -> None:
    pipeline, engine = make(0.01)
    await asyncio.gather(*(answer(pipeline, ask(temperature=0.7)) for _ in range(64)))
    assert engine.generations == 64


async def test_a_leader_that_leaves_leaves_it_to_the_others() -> None:
    pipeline, engine = make(0.02)
    leading = asyncio.create_task(pipeline.start(ask("a b c d e f", stream=True)))
    await settled()
    followers = [
        asyncio.create_task(answer(pipeline, ask("a b c d e f", stream=number > 2)))
        for number in range(5)
    ]
    await settled()
    leading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leading
    for follower in followers:
        assert await follower == ("coalesced", "a b c d e f")
    assert (engine.generations, engine.aborted) == (1, 0)
    assert await pipeline.drain(10)
    assert pipeline.models.first.admission.running == 0


async def test_a_stream_does_not_wait_for_the_end_of_a_whole_answer() -> None:
    pipeline, engine = make(0.02)
    whole = asyncio.create_task(answer(pipeline, ask("a b c d e f")))
    await settled()
    stream = await pipeline.start(ask("a b c d e f", stream=True))
    assert not whole.done()
    assert stream.context.cache_status == "miss"
    late = asyncio.create_task(answer(pipeline, ask("a b c d e f")))
    assert await read(stream) == "a b c d e f"
    assert await whole == ("miss", "a b c d e f")
    assert await late == ("coalesced", "a b c d e f"), "whole ones may wait for either"
    assert engine.generations == 2
    assert await pipeline.drain(10)


async def test_a_leader_that_leaves_before_a_follower_has_read_anything() -> None:
    """The leader reads the engine itself, and takes that along; the follower begins again."""
    pipeline, engine = make(0.05)
    leader = await pipeline.start(ask("a b c d", stream=True))
    reading = asyncio.create_task(read(leader))
    await settled()
    follower = asyncio.create_task(answer(pipeline, ask("a b c d", stream=True)))
    await settled()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await follower == ("miss", "a b c d")
    assert (engine.generations, engine.aborted) == (2, 1)
    assert await pipeline.drain(10)
    assert pipeline.models.first.admission.running == 0


async def test_a_slow_leader_holds_nobody_back() -> None:
    pipeline, engine = make()
    leader = await pipeline.start(ask("a b c d", stream=True))
    chunks = aiter(leader)
    await anext(chunks)  # and reads no more
    assert await answer(pipeline, ask("a b c d", stream=True)) == ("coalesced", "a b c d")
    assert [chunk.text async for chunk in chunks] == [" b", " c", " d"]
    assert engine.generations == 1


async def test_the_last_to_leave_aborts() -> None:
    pipeline, engine = make(0.02)
    streams = [await pipeline.start(ask("a b c d e f", stream=True)) for _ in range(3)]
    for stream in streams:
        assert engine.aborted == 0
        await stream.close()
    await settled()
    assert (engine.generations, engine.aborted, engine.running) == (1, 1, 0)
    assert pipeline.models.first.admission.running == 0
    assert await pipeline.drain(10)
    assert (await answer(pipeline, ask("a b c d e f")))[0] == "miss"


async def test_a_slow_follower_gets_it_all() -> None:
    pipeline, engine = make()
    leader = await pipeline.start(ask("a b c", stream=True))
    follower = await pipeline.start(ask("a b c", stream=True))
    assert await read(leader) == "a b c"
    parts = []
    async for chunk in follower:
        await asyncio.sleep(0.02)
        parts.append(chunk.text)
    assert "".join(parts) == "a b c"
    assert engine.generations == 1


async def test_deadlines_are_each_callers_own() -> None:
    pipeline, engine = make(0.05)
    patient = asyncio.create_task(answer(pipeline, ask("a b c d")))
    await settled()
    with pytest.raises(ServeError, match=r"0\.05"):
        await pipeline.start(replace(ask("a b c d"), timeout_s=0.05))
    assert await patient == ("miss", "a b c d")
    # And the other way round: the leader's ends before its follower's.
    hasty = asyncio.create_task(pipeline.start(replace(ask("a b c e"), timeout_s=0.05)))
    await settled()
    patient = asyncio.create_task(answer(pipeline, ask("a b c e")))
    with pytest.raises(ServeError):
        await hasty
    assert await patient == ("coalesced", "a b c e")
    assert engine.generations == 2


async def test_who_has_sent_nothing_takes_over() -> None:
    """The engine ends under a stream: what has begun ends with it, the others try again, once."""
    pipeline, engine = make(0.02)
    engine.failures = [EngineDied("gone")]

    leading = asyncio.create_task(pipeline.start(ask("a b c", stream=True)))
    await settled()
    followers = [asyncio.create_task(answer(pipeline, ask("a b c"))) for _ in range(5)]
    # The first chunk raises: nobody has sent anything, all of them go on to one new generation.
    assert await read(await leading) == "a b c"
    assert {text for _, text in await asyncio.gather(*followers)} == {"a b c"}
    assert engine.generations == 2


async def test_poison_is_not_tried_again() -> None:
    pipeline, engine = make(0.02)
    engine.failures = [Invalid("It ends the engine.")]
    ends = await asyncio.gather(
        *(pipeline.start(ask("a b c")) for _ in range(5)), return_exceptions=True
    )
    assert {type(end) for end in ends} == {Invalid}
    assert engine.generations == 1
    assert await pipeline.drain(10)


async def test_a_leader_that_is_refused_refuses_nobody_else() -> None:
    """Its key has no tokens left; others of its tenant have."""
    pipeline, engine = make(0.02)
    poor = replace(ask("a b c"), caller=caller("acme", tokens_per_minute=1))
    rich = ask("a b c", tenant="acme")
    # Larger than the whole quota: let through, and leaves a debt.
    assert await answer(pipeline, poor) == ("miss", "a b c")
    other = replace(poor, messages=({"role": "user", "content": "d e f"},))
    with pytest.raises(Overloaded):
        await pipeline.start(other)
    assert (await answer(pipeline, rich))[0] == "hit"
    assert engine.generations == 1


async def test_hits_count_as_requests_not_as_tokens() -> None:
    pipeline, _ = make()
    limited = replace(
        ask("a b c"), caller=caller("acme", tokens_per_minute=10_000, requests_per_minute=3)
    )
    marks = [(await answer(pipeline, limited))[0] for _ in range(3)]
    assert marks == ["miss", "hit", "hit"]
    with pytest.raises(Overloaded, match="3 requests per minute"):
        await pipeline.start(limited)
    tokens = replace(ask("d"), caller=caller("acme", tokens_per_minute=5000))
    object.__setattr__(tokens.caller, "name", "another")
    for _ in range(20):
        await answer(pipeline, tokens)
    account = pipeline.models.first.admission._account(tokens.caller)
    assert account.tokens.level > 4900


async def test_a_hit_is_not_refused_because_the_engine_is_full() -> None:
    pipeline, _ = make(0.2, limits={"max_in_engine": 1})
    await answer(pipeline, ask("a"))
    busy = asyncio.create_task(answer(pipeline, ask("b b b")))
    await settled()
    with pytest.raises(Overloaded):
        await pipeline.start(ask("c"))
    assert (await answer(pipeline, ask("a")))[0] == "hit"
    follower = asyncio.create_task(answer(pipeline, ask("b b b")))
    assert (await follower)[0] == "coalesced"
    await busy


@pytest.mark.parametrize("value", [10**30, "\ud800"], ids=["71 bits", "half a character"])
async def test_what_has_no_key_is_answered_without(value: Any) -> None:
    pipeline, engine = make()
    tools = ({"type": "function", "function": {"name": "f", "parameters": {"maximum": value}}},)
    request = ask("a b")
    request = replace(request, chat=replace(request.chat, tools=tools))
    assert [await answer(pipeline, request) for _ in range(2)] == [("bypass", "a b")] * 2
    assert await pipeline.drain(10)
    assert engine.running == 0


async def test_followers_of_refused_leaders_are_refused_for_reasons_of_their_own() -> None:
    pipeline, _ = make(0.3, limits={"max_in_engine": 1})
    with pytest.raises(ServeError):  # its prompt is known from now on, its answer is not
        await pipeline.start(replace(ask("a b"), timeout_s=0.01))
    busy = asyncio.create_task(answer(pipeline, ask("x")))
    await settled()
    ends = await asyncio.gather(
        *(pipeline.start(ask("a b")) for _ in range(12)), return_exceptions=True
    )
    assert {type(end) for end in ends} == {Overloaded}
    await busy
    assert await pipeline.drain(10)


async def test_a_deadline_holds_for_who_takes_over() -> None:
    pipeline, engine = make(0.1)
    engine.failures = [EngineDied("gone")]
    leading = asyncio.create_task(pipeline.start(ask("a b c d e f", stream=True)))
    await settled()
    with pytest.raises(ServeError, match="longer than its"):
        await pipeline.start(replace(ask("a b c d e f"), timeout_s=0.3))
    await (await leading).close()


async def test_taking_over_is_not_another_request() -> None:
    pipeline, engine = make(0.02)
    engine.failures = [EngineDied("gone")]
    limited = replace(ask("a b"), caller=caller("acme", requests_per_minute=2))
    assert (await answer(pipeline, limited))[1] == "a b"
    assert engine.generations == 2
    account = pipeline.models.first.admission._account(limited.caller)
    assert 0.9 < account.requests.level < 1.1


class SlowStore:
    """Has an old result for everything, and takes its time."""

    name = "slow"

    async def get(self, key: Key) -> bytes:
        await asyncio.sleep(0.05)
        old = Result((Chunk("old", [1], "stop"),), 900.0)
        return seal(encode(old), key.digest, b"s" * 32)

    async def put(self, key: Key, value: bytes, ttl_s: float) -> None: ...

    async def merge_epochs(self, seen: Mapping[str, str]) -> dict[str, str]:
        return {"all": "0" * 16, **seen}

    async def count(self, scope: str) -> int | None:
        return None

    async def close(self) -> None: ...


async def test_who_wants_nothing_old_does_not_join_who_may_get_it() -> None:
    pipeline, engine = make(clock=Clock(), ttl_s=3600.0, store=SlowStore())
    cache = pipeline.models.first.cache
    assert isinstance(cache, ResultCache)
    await cache.start()
    patient = asyncio.create_task(answer(pipeline, ask("a b")))
    await settled()
    assert await answer(pipeline, ask("a b", max_age_s=1)) == ("miss", "a b")
    assert await patient == ("hit", "old")
    assert engine.generations == 1


async def test_batches() -> None:
    pipeline, engine = make(0.01)
    await answer(pipeline, ask("one"))
    streams = await pipeline.start_all([ask("one"), ask("two"), ask("two"), ask("one")])
    assert [await read(stream) for stream in streams] == ["one", "two", "two", "one"]
    assert [stream.context.cache_status for stream in streams] == [
        "hit",
        "miss",
        "coalesced",
        "hit",
    ]
    assert engine.generations == 2
    assert await pipeline.drain(10)


async def test_a_batch_that_is_refused_leaves_nothing_to_wait_for() -> None:
    pipeline, engine = make(0.01, limits={"max_in_engine": 2})
    busy = asyncio.create_task(answer(pipeline, ask("x y z")))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await pipeline.start_all([ask("one"), ask("two")])
    await busy
    assert (await answer(pipeline, ask("one")))[0] == "miss"
    assert engine.generations == 2
    assert await pipeline.drain(10)


class AwayStore:
    """A shared store that has never answered."""

    name = "away"

    async def get(self, key: Key) -> bytes | None:
        raise AssertionError("a store that does not answer is left alone")

    put = merge_epochs = count = get

    async def close(self) -> None: ...


async def test_a_generation_is_shared_while_the_store_is_away() -> None:
    """Kept answers are not given out then, since a flush elsewhere could not be heard of; but what
    is being generated is not old.
    """
    pipeline, engine = make(0.01, store=AwayStore())
    found = await asyncio.gather(*(answer(pipeline, ask("one two")) for _ in range(3)))
    assert [mark for mark, _ in found] == ["miss", "coalesced", "coalesced"]
    assert engine.generations == 1
    assert (await answer(pipeline, ask("one two")))[0] == "miss"


async def test_another_salt_of_a_client_shares_no_generation() -> None:
    pipeline, engine = make(0.01)
    asked = [replace(ask("one two"), cache_salt=salt) for salt in ("a", "b", "a")]
    found = await asyncio.gather(*(answer(pipeline, request) for request in asked))
    assert [mark for mark, _ in found] == ["miss", "miss", "coalesced"]
    assert engine.generations == 2


async def test_the_log_says_it_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, _ = make()
    with caplog.at_level(logging.INFO, "packhorse"):
        for _ in range(2):
            await answer(pipeline, ask("secret words"))
        await asyncio.gather(*(answer(pipeline, ask("other words")) for _ in range(2)))
    lines = request_lines(caplog)
    assert [(line["outcome"], line["cache"]) for line in lines] == [
        ("ok", "miss"),
        ("ok", "hit"),
        ("ok", "miss"),
        ("ok", "coalesced"),
    ]
    # Who joins has no time in the engine's queue; that is its leader's.
    assert [("before_engine_s" in line) for line in lines] == [True, False, True, False]
    assert "words" not in str(lines) + caplog.text


async def test_a_follower_that_begins_again_is_not_counted_twice() -> None:
    """It was let in with its quota's last request."""
    pipeline, _ = make(0.05)
    one_a_minute = caller("acme", requests_per_minute=1)
    leading = asyncio.create_task(
        answer(pipeline, replace(ask("a b c", stream=True), caller=caller("acme")))
    )
    await settled()
    follower = asyncio.create_task(answer(pipeline, replace(ask("a b c"), caller=one_a_minute)))
    await settled()
    flight = next(iter(pipeline.models.first.cache._flights._flying.values()))  # type: ignore[attr-defined]
    leading.cancel()
    flight._land(Cancelled("The leader is gone."))
    assert (await follower)[1] == "a b c"
    assert await pipeline.drain(10)
