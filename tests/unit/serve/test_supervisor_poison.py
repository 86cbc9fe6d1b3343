"""Poison that comes again: refused without a death, and no engine is counted that died of it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest

from packhorse.serve.engines.quarantine import POISON as REFUSAL
from packhorse.serve.engines.supervisor import Supervisor
from packhorse.serve.errors import EngineDied, Invalid, Unavailable
from packhorse.serve.messages import (
    AdapterVersion,
    ChatOptions,
    Chunk,
    Constraint,
    GenerateRequest,
    Prompt,
    Route,
    Sampling,
)
from tests.unit.serve.test_supervisor import (
    ROUTE,
    Mortal,
    Works,
    answer,
    ask,
    is_up,
    soon,
    words,
)

pytestmark = pytest.mark.usefixtures("checked_often")
KIND = REFUSAL.partition(",")[0]


class Poisoned(Mortal):
    """Dies of prompts that begin with `poison`; after a chunk of those that begin with `late`."""

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        kills = prompt.engine_input.startswith("poison")
        late = prompt.engine_input.startswith("late")
        if kills and not self.end.done():
            self.die()
            await asyncio.sleep(0)
        async for chunk in super().generate(prompt, request, route):
            yield chunk
            if late:
                self.die()


def refused(works: Works) -> float:
    return works.metrics.poison_refused._value.get()  # type: ignore[no-any-return]


def found(works: Works) -> float:
    return works.metrics.poison._value.get()  # type: ignore[no-any-return]


async def insist(supervisor: Supervisor, request: GenerateRequest) -> str:
    """As a client that asks again whatever it is told, until it is told that it is at fault."""
    while True:
        try:
            return await answer(supervisor, request)
        except Unavailable:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["poison", "late"])
async def test_three_poisons_ten_times_each_take_two_engines_each(kind: str, stream: bool) -> None:
    """And everybody else is answered."""
    works = Works(make=Poisoned)
    supervisor = await works.supervisor(max_restarts=5)
    over = asyncio.Event()

    async def good() -> None:
        while not over.is_set():
            assert await insist(supervisor, ask(words(5))) == words(5)

    goods = [asyncio.create_task(good()) for _ in range(4)]
    await soon(lambda: works.engines[0].running > 0)

    async def client(number: int) -> None:
        for _ in range(10):
            with pytest.raises(Invalid, match=KIND):
                await insist(supervisor, ask(f"{kind} {number} x", stream=stream))

    await asyncio.gather(*(client(number) for number in range(3)))
    over.set()
    await asyncio.gather(*goods)
    assert found(works) == 3
    assert refused(works) >= 27
    assert len(works.engines) <= 1 + 2 * 3
    assert not supervisor.gave_up.is_set()
    await supervisor.close()


async def poisoned(*texts: str, **settings: float) -> tuple[Supervisor, Works]:
    """A supervisor that has found these to be poison."""
    works = Works(make=Poisoned)
    supervisor = await works.supervisor(**settings)
    assert await insist(supervisor, ask("works")) == "works"
    for text in texts:
        with pytest.raises(Invalid, match=KIND):
            await insist(supervisor, ask(text))
        await soon(lambda: supervisor._engine is not None)
        assert await insist(supervisor, ask("works")) == "works"
    return supervisor, works


async def test_it_is_refused_while_there_is_no_engine_too() -> None:
    supervisor, works = await poisoned("poison")
    prompt = await supervisor.render(ask("poison"), ROUTE)
    works.fail = lambda number: True
    works.engines[-1].die()
    await soon(lambda: supervisor._engine is None)
    with pytest.raises(Invalid, match=KIND):
        await anext(supervisor.generate(prompt, ask("poison"), ROUTE))
    await supervisor.close()


CHANGED = [
    Sampling(seed=1), Sampling(temperature=0.3, top_p=0.5, top_k=3, min_p=0.1),
    Sampling(max_tokens=3), Sampling(n=2), Sampling(stop=("x",), ignore_eos=True),
    Sampling(presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1),
]  # fmt: skip


@pytest.mark.parametrize("sampling", CHANGED, ids=repr)
async def test_what_a_client_changes_when_it_asks_again_does_not_help(sampling: Sampling) -> None:
    supervisor, works = await poisoned("poison 1")
    engines = len(works.engines)
    request = replace(ask("poison 1", stream=True), sampling=sampling, request_id="other")
    with pytest.raises(Invalid, match=KIND):
        await answer(supervisor, request)
    assert len(works.engines) == engines
    await supervisor.close()


OTHERS = [
    Sampling(constraint=Constraint("json", {"type": "object"})), Sampling(logprobs=2),
    Sampling(prompt_logprobs=0), Sampling(logit_bias={3: 1.0}), Sampling(bad_words=("x",)),
    Sampling(allowed_token_ids=(1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("sampling", OTHERS, ids=repr)
async def test_what_makes_the_engine_run_other_code_is_another_request(sampling: Sampling) -> None:
    """A schema that kills must not take its prompt from everybody."""
    supervisor, _ = await poisoned()
    quarantine = supervisor._detector.quarantine
    prompt = await supervisor.render(ask("Hello"), ROUTE)
    plain = quarantine.fingerprint(prompt, ask("Hello"), ROUTE)
    other = quarantine.fingerprint(prompt, replace(ask("Hello"), sampling=sampling), ROUTE)
    forced = replace(ask("Hello"), chat=ChatOptions(tool_choice="required", tools=({"a": 1},)))
    adapter = AdapterVersion("clinic", "0" * 64, Path(), 1, 8)
    found = {
        plain,
        other,
        quarantine.fingerprint(prompt, forced, ROUTE),
        quarantine.fingerprint(prompt, ask("Hello"), Route("echo", adapter)),
    }
    assert len(found) == 4
    await supervisor.close()


async def test_deaths_of_poison_do_not_end_the_server() -> None:
    texts = [f"poison {number}" for number in range(4)]
    supervisor, works = await poisoned(*texts, max_restarts=1, backoff_s=60)
    assert not supervisor.gave_up.is_set()
    assert len(works.engines) == 1 + 2 * 4, "and none waited for the backoff"
    await supervisor.close()


async def test_an_engine_that_dies_of_everything_is_still_given_up() -> None:
    """A device that is broken makes every request look like poison."""
    works = Works(make=Poisoned)
    supervisor = await works.supervisor(max_restarts=3)

    async def client(number: int) -> None:
        with pytest.raises((Invalid, Unavailable)):
            await insist_until_over(supervisor, ask(f"poison {number}"))

    await asyncio.gather(*(client(number) for number in range(20)))
    assert supervisor.gave_up.is_set()
    assert len(works.engines) <= 6
    await supervisor.close()


async def insist_until_over(supervisor: Supervisor, request: GenerateRequest) -> None:
    while not supervisor.gave_up.is_set():
        try:
            await answer(supervisor, request)
        except Unavailable:
            await asyncio.sleep(0.005)
    raise Unavailable("over")


async def test_a_client_that_leaves_before_it_is_told_has_been_seen() -> None:
    """Its time is shorter than a rebuild: it asks again, and is a new request each time."""
    works = Works(make=Poisoned)
    supervisor = await works.supervisor()
    gate = threading.Event()
    works.fail = lambda number: not gate.wait(60)
    first = asyncio.create_task(answer(supervisor, ask("poison")))
    await soon(lambda: works.engines[0].closed > 0)
    first.cancel()
    gate.set()
    await soon(lambda: len(works.engines) == 2)
    with pytest.raises(Invalid, match=KIND):
        await insist(supervisor, ask("poison"))
    assert len(works.engines) <= 3
    await supervisor.close()


async def test_a_suspect_that_comes_late_runs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the first 30 seconds of an engine, when nobody takes turns any more."""
    monkeypatch.setattr("packhorse.serve.engines.poison_detector.ISOLATION_S", 0.0)
    works = Works(make=Poisoned)
    supervisor = await works.supervisor()
    request = ask("late x y", stream=True)
    with pytest.raises(EngineDied, match="while it answered"):
        await answer(supervisor, request)
    await soon(lambda: is_up(supervisor, works, 2))
    others = [asyncio.create_task(answer(supervisor, ask(words(20)))) for _ in range(4)]
    await soon(lambda: works.engines[1].running == 4)
    with pytest.raises(EngineDied, match="while it answered"):
        await answer(supervisor, request)
    with pytest.raises(Invalid, match=KIND):
        await insist(supervisor, request)
    assert await asyncio.gather(*others) == [words(20)] * 4
    assert len(works.engines) <= 3
    await supervisor.close()


async def test_an_innocent_stream_runs_alone_once_and_is_forgotten() -> None:
    works = Works()
    supervisor = await works.supervisor()
    request = ask(words(8), stream=True)
    chunks = supervisor.generate(await supervisor.render(request, ROUTE), request, ROUTE)
    await anext(chunks)
    works.engines[0].die()
    with pytest.raises(EngineDied):
        await anext(chunks)
    assert not supervisor._detector.quarantine.is_empty
    await soon(lambda: is_up(supervisor, works, 2))
    assert await answer(supervisor, request) == words(8)
    assert supervisor._detector.quarantine.is_empty
    await supervisor.close()


async def test_the_memory_and_the_log_hold_no_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        supervisor, _ = await poisoned("poison secretword")
        with pytest.raises(Invalid) as caught:
            await answer(supervisor, ask("poison secretword"))
    assert "secretword" not in caplog.text + str(caught.value)
    assert "3600 s" in str(caught.value)
    await supervisor.close()
