"""The service with a result cache, on the echo engine: what is shared, what is not, who pays."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from serve import metrics
from serve.admission import Admission
from serve.cache.results import ResultCache
from serve.engines.echo import EchoEngine
from serve.errors import EngineDied, Invalid, Overloaded, ServeError
from serve.messages import Chunk, GenerateRequest, Prompt, Route
from serve.sections import AdmissionSettings, EngineSettings
from serve.service import Service
from serve.stream import Stream
from tests.unit.serve.cache.making import ask, caller


class Counting(EchoEngine):
    """Counts generations, and can fail them."""

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__(EngineSettings(kind="echo", echo_delay_s=delay_s))
        self.generations = 0
        self.failures: list[Exception] = []
        self.partitions: list[str | None] = []

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        self.partitions.append(route.partition)
        return await super().render(request, route)

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        self.generations += 1
        failure = self.failures.pop(0) if self.failures else None
        async for chunk in super().generate(prompt, request, route):
            if failure is not None:
                raise failure
            yield chunk


class Clock:
    """Unix time."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make(
    delay_s: float = 0.0, *, limits: dict[str, Any] | None = None, **options: Any
) -> tuple[Service, Counting]:
    engine = Counting(delay_s)
    known: dict[str, Any] = {"memory_bytes": 2**20, "max_entry_bytes": 2**16, "ttl_s": 60.0}
    cache = ResultCache(b"s" * 32, **{**known, **options})
    cache.identity = b"model"
    admission = Admission(AdmissionSettings(**(limits or {})))
    service = Service("echo", admission=admission, cache=cache)
    service.attach(engine)
    return service, engine


async def read(stream: Stream) -> str:
    return "".join([chunk.text async for chunk in stream])


async def answer(service: Service, request: GenerateRequest) -> tuple[str, str]:
    """The mark, and the text."""
    stream = await service.start(request)
    return stream.mark, await read(stream)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
async def test_one_result_serves_streams_and_whole_answers(first: bool, second: bool) -> None:
    service, engine = make()
    assert await answer(service, ask("a b c", stream=first)) == ("miss", "a b c")
    stream = await service.start(ask("a b c", stream=second))
    assert (stream.mark, await read(stream)) == ("hit", "a b c")
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens) == (3, 3)
    assert engine.generations == 1
    assert service.admission.running == 0
    assert await service.drain(0.1)


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
    service, engine = make()
    await answer(service, ask("a b c"))
    mark, _ = await answer(service, ask(**{"text": "a b c", **other}))
    assert (mark, engine.generations) == ("miss", 2)


async def test_sampled_answers_are_not_kept() -> None:
    service, engine = make()
    for _ in range(2):
        assert (await answer(service, ask(temperature=0.7)))[0] == "bypass"
    for _ in range(2):
        await answer(service, ask(temperature=None))  # 1.0, by this engine
    assert engine.generations == 4
    marks = [(await answer(service, ask(temperature=0.7, seed=3)))[0] for _ in range(2)]
    assert marks == ["miss", "hit"]
    always = ask(temperature=0.7, mode="always")
    assert [(await answer(service, always))[0] for _ in range(2)] == ["miss", "hit"]


async def test_the_callers_policy() -> None:
    clock = Clock()
    service, engine = make(clock=clock)

    async def mark(**policy: Any) -> str:
        return (await answer(service, ask(**policy)))[0]

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
    service, engine = make()
    for _ in range(2):
        with pytest.raises(ServeError):
            await service.start(ask("!dead"))
        stream = await service.start(ask("!dead-later", stream=True))
        with pytest.raises(ServeError):
            await read(stream)
    assert engine.generations >= 4
    assert await service.drain(0.1)


async def test_large_results_are_not_kept() -> None:
    service, _ = make(max_entry_bytes=50)
    before = metrics.CACHE_STORES.labels("too_large")._value.get()
    marks = [(await answer(service, ask("word " * 100)))[0] for _ in range(2)]
    assert marks == ["miss", "miss"]
    assert metrics.CACHE_STORES.labels("too_large")._value.get() == before + 2


async def test_another_engine_is_another_model() -> None:
    service, engine = make()
    await answer(service, ask())
    assert service._cache is not None
    service._cache.identity = b"another"  # type: ignore[attr-defined]
    assert (await answer(service, ask()))[0] == "miss"
    assert engine.generations == 2


async def test_what_two_engines_answered_is_not_kept() -> None:
    """An engine that was replaced on the way may have answered, or the one that came after it."""
    service, engine = make(0.05)
    stream = await service.start(ask("a b c", stream=True))
    assert service._cache is not None
    service._cache.identity = b"another"  # type: ignore[attr-defined]
    assert await read(stream) == "a b c"
    service._cache.identity = b"model"  # type: ignore[attr-defined]
    assert (await answer(service, ask("a b c")))[0] == "miss"
    assert engine.generations == 2


async def test_64_equal_requests_make_one_generation() -> None:
    service, engine = make(0.01)
    saved = metrics.CACHE_SAVED_TOKENS._value.get()
    found = await asyncio.gather(
        *(answer(service, ask("a b c", stream=number % 2 == 0)) for number in range(64))
    )
    assert engine.generations == 1
    assert {text for _, text in found} == {"a b c"}
    assert Counter(mark for mark, _ in found) == {"miss": 1, "coalesced": 63}
    assert metrics.CACHE_SAVED_TOKENS._value.get() == saved + 63 * 3
    assert await service.drain(0.1)


async def test_64_sampled_requests_make_64() -> None:
    service, engine = make(0.01)
    await asyncio.gather(*(answer(service, ask(temperature=0.7)) for _ in range(64)))
    assert engine.generations == 64


async def test_a_leader_that_leaves_leaves_it_to_the_others() -> None:
    service, engine = make(0.02)
    leading = asyncio.create_task(service.start(ask("a b c d e f")))
    await asyncio.sleep(0.03)
    followers = [
        asyncio.create_task(answer(service, ask("a b c d e f", stream=number > 2)))
        for number in range(5)
    ]
    await asyncio.sleep(0.01)
    leading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leading
    for follower in followers:
        assert await follower == ("coalesced", "a b c d e f")
    assert (engine.generations, engine.aborted) == (1, 0)
    assert await service.drain(0.1)
    assert service.admission.running == 0


async def test_the_last_to_leave_aborts() -> None:
    service, engine = make(0.02)
    streams = [await service.start(ask("a b c d e f", stream=True)) for _ in range(3)]
    for stream in streams:
        assert engine.aborted == 0
        await stream.close()
    await asyncio.sleep(0.01)
    assert (engine.generations, engine.aborted, engine.running) == (1, 1, 0)
    assert service.admission.running == 0
    assert await service.drain(0.1)
    assert (await answer(service, ask("a b c d e f")))[0] == "miss"


async def test_a_slow_follower_gets_it_all() -> None:
    service, engine = make()
    leader = await service.start(ask("a b c", stream=True))
    follower = await service.start(ask("a b c", stream=True))
    assert await read(leader) == "a b c"
    parts = []
    async for chunk in follower:
        await asyncio.sleep(0.02)
        parts.append(chunk.text)
    assert "".join(parts) == "a b c"
    assert engine.generations == 1


async def test_deadlines_are_each_callers_own() -> None:
    service, engine = make(0.05)
    patient = asyncio.create_task(answer(service, ask("a b c d")))
    await asyncio.sleep(0.01)
    with pytest.raises(ServeError, match=r"0\.05"):
        await service.start(replace(ask("a b c d"), timeout_s=0.05))
    assert await patient == ("miss", "a b c d")
    # And the other way round: the leader's ends before its follower's.
    hasty = asyncio.create_task(service.start(replace(ask("a b c e"), timeout_s=0.05)))
    await asyncio.sleep(0.01)
    patient = asyncio.create_task(answer(service, ask("a b c e")))
    with pytest.raises(ServeError):
        await hasty
    assert await patient == ("coalesced", "a b c e")
    assert engine.generations == 2


async def test_who_has_sent_nothing_takes_over() -> None:
    """The engine ends under a stream: what has begun ends with it, the others try again, once."""
    service, engine = make(0.02)
    engine.failures = [EngineDied("gone")]

    leading = asyncio.create_task(service.start(ask("a b c", stream=True)))
    await asyncio.sleep(0.005)
    followers = [asyncio.create_task(answer(service, ask("a b c"))) for _ in range(5)]
    # The first chunk raises: nobody has sent anything, all of them go on to one new generation.
    assert await read(await leading) == "a b c"
    assert {text for _, text in await asyncio.gather(*followers)} == {"a b c"}
    assert engine.generations == 2


async def test_poison_is_not_tried_again() -> None:
    service, engine = make(0.02)
    engine.failures = [Invalid("It ends the engine.")]
    ends = await asyncio.gather(
        *(service.start(ask("a b c")) for _ in range(5)), return_exceptions=True
    )
    assert {type(end) for end in ends} == {Invalid}
    assert engine.generations == 1
    assert await service.drain(0.1)


async def test_a_leader_that_is_refused_refuses_nobody_else() -> None:
    """Its key has no tokens left; others of its tenant have."""
    service, engine = make(0.02)
    poor = replace(ask("a b c"), caller=caller("acme", tokens_per_minute=1))
    rich = ask("a b c", tenant="acme")
    await service.start(poor)  # larger than the whole quota: let through, and leaves a debt
    await asyncio.sleep(0.1)
    other = replace(poor, messages=({"role": "user", "content": "d e f"},))
    with pytest.raises(Overloaded):
        await service.start(other)
    assert (await answer(service, rich))[0] == "hit"
    assert engine.generations == 1


async def test_hits_count_as_requests_not_as_tokens() -> None:
    service, _ = make()
    limited = replace(
        ask("a b c"), caller=caller("acme", tokens_per_minute=10_000, requests_per_minute=3)
    )
    marks = [(await answer(service, limited))[0] for _ in range(3)]
    assert marks == ["miss", "hit", "hit"]
    with pytest.raises(Overloaded, match="3 requests per minute"):
        await service.start(limited)
    tokens = replace(ask("d"), caller=caller("acme", tokens_per_minute=5000))
    object.__setattr__(tokens.caller, "name", "another")
    for _ in range(20):
        await answer(service, tokens)
    account = service.admission._account(tokens.caller)
    assert account.tokens.level > 4900


async def test_a_hit_is_not_refused_because_the_engine_is_full() -> None:
    service, _ = make(0.2, limits={"max_running": 1})
    await answer(service, ask("a"))
    busy = asyncio.create_task(answer(service, ask("b b b")))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await service.start(ask("c"))
    assert (await answer(service, ask("a")))[0] == "hit"
    follower = asyncio.create_task(answer(service, ask("b b b")))
    assert (await follower)[0] == "coalesced"
    await busy


async def test_batches() -> None:
    service, engine = make(0.01)
    await answer(service, ask("one"))
    streams = await service.start_all([ask("one"), ask("two"), ask("two"), ask("one")])
    assert [await read(stream) for stream in streams] == ["one", "two", "two", "one"]
    assert [stream.mark for stream in streams] == ["hit", "miss", "coalesced", "hit"]
    assert engine.generations == 2
    assert await service.drain(0.1)


async def test_a_batch_that_is_refused_leaves_nothing_to_wait_for() -> None:
    service, engine = make(0.01, limits={"max_running": 2})
    busy = asyncio.create_task(answer(service, ask("x y z")))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await service.start_all([ask("one"), ask("two")])
    await busy
    assert (await answer(service, ask("one")))[0] == "miss"
    assert engine.generations == 2
    assert await service.drain(0.1)


async def test_tenants_have_parts_of_the_prefix_cache() -> None:
    service, engine = make()
    asked = [ask(tenant=name, temperature=0.7) for name in ("a", "b", "a")]
    asked += [replace(request, cache_salt="x") for request in asked[:2]]
    for request in asked:
        await answer(service, request)
    a, b, again, salted_a, salted_b = engine.partitions
    assert a == again
    assert len({a, b, salted_a, salted_b}) == 4


async def test_the_log_says_it_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    service, _ = make()
    with caplog.at_level(logging.INFO, "packhorse"):
        for _ in range(2):
            await answer(service, ask("secret words"))
        await asyncio.gather(*(answer(service, ask("other words")) for _ in range(2)))
    lines = [line for line in caplog.messages if "outcome=ok" in line]
    assert [line.split("cache=")[1].split()[0] for line in lines] == [
        "miss",
        "hit",
        *sorted(("coalesced", "miss"), reverse=True),
    ]
    assert "words" not in caplog.text
