"""The supervisor over engines that die and hang on purpose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.engines.poison_detector import TrackedRequest
from packhorse.serve.engines.supervisor import Supervisor
from packhorse.serve.errors import EngineDied, EngineHung, Invalid, StartupError, Unavailable
from packhorse.serve.messages import Chunk, GenerateRequest, Prompt, Route, Sampling
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.settings.engine import EngineSettings
from packhorse.serve.settings.supervisor import SupervisorSettings

pytestmark = pytest.mark.usefixtures("checked_often")
ROUTE = Route("echo")
POISON = "poison " * 20


class Mortal(EchoEngine):
    """Dies of a prompt, or when told to; then everything in it ends with EngineDied."""

    def __init__(self, delay_s: float = 0.01) -> None:
        super().__init__(EngineSettings(kind="echo", echo_delay_s=delay_s))
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.hangs = False
        self.closed = 0

    def die(self) -> None:
        if not self.end.done():
            self.end.set_result(None)

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        if self.end.done():
            raise EngineDied("dead before")
        if prompt.engine_input == POISON:
            asyncio.get_running_loop().call_later(0.05, self.die)
        chunks = super().generate(prompt, request, route)
        while True:
            step = asyncio.ensure_future(anext(chunks))
            await asyncio.wait([step, self.end], return_when=asyncio.FIRST_COMPLETED)
            if self.end.done():
                step.cancel()
                raise EngineDied("died")
            try:
                chunk = step.result()
            except StopAsyncIteration:
                return
            yield chunk

    async def check(self) -> None:
        if self.hangs:
            raise EngineHung("does nothing")
        if self.end.done():
            raise EngineDied("dead")

    async def close(self) -> None:
        self.closed += 1
        self.die()


@dataclass
class Works:
    """Builds engines, and keeps them."""

    engines: list[Mortal] = field(default_factory=list)
    fail: Callable[[int], bool] = lambda number: False
    error: type[Exception] = StartupError
    tries: int = 0
    make: Callable[[], Mortal] = Mortal
    metrics: ModelMetrics = field(default_factory=ModelMetrics)

    async def supervisor(self, **settings: float) -> Supervisor:
        loop = asyncio.get_running_loop()

        async def make() -> Mortal:
            return self.make()

        def build() -> Mortal:
            self.tries += 1
            if self.fail(self.tries):
                raise self.error("no memory")
            engine = asyncio.run_coroutine_threadsafe(make(), loop).result()
            self.engines.append(engine)
            return engine

        chosen = SupervisorSettings.model_validate({"backoff_s": 0.0, **settings})
        supervisor = Supervisor(build, chosen, metrics=self.metrics)
        await supervisor.start()
        return supervisor


def ask(text: str, *, stream: bool = False) -> GenerateRequest:
    messages = ({"role": "user", "content": text},)
    return GenerateRequest("id", "echo", Sampling(), messages=messages, stream=stream)


async def answer(supervisor: Supervisor, request: GenerateRequest) -> str:
    prompt = await supervisor.render(request, ROUTE)
    return "".join([chunk.text async for chunk in supervisor.generate(prompt, request, ROUTE)])


def is_up(supervisor: Supervisor, works: Works, number: int) -> bool:
    """Whether the engine of that number serves."""
    return len(works.engines) == number and supervisor._engine is works.engines[-1]


async def soon(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def words(count: int) -> str:
    return " ".join(f"w{number}" for number in range(count))


async def test_what_has_not_streamed_is_answered_by_the_next_engine() -> None:
    works = Works()
    supervisor = await works.supervisor()
    asked = [words(10 + number) for number in range(8)]
    tasks = [asyncio.create_task(answer(supervisor, ask(text))) for text in asked]
    await soon(lambda: works.engines[0].running == 8)
    works.engines[0].die()
    assert await asyncio.gather(*tasks) == asked
    assert len(works.engines) == 2
    assert works.engines[0].closed
    assert works.metrics.requests_waiting_for_engine() == 0
    await supervisor.close()


async def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    works = Works()
    supervisor = await works.supervisor()
    request = ask(words(50), stream=True)
    prompt = await supervisor.render(request, ROUTE)
    chunks = supervisor.generate(prompt, request, ROUTE)
    await anext(chunks)
    works.engines[0].die()
    with pytest.raises(EngineDied, match="while it answered"):
        async for _ in chunks:
            pass
    await soon(lambda: is_up(supervisor, works, 2))
    assert await answer(supervisor, ask("back")) == "back"
    await supervisor.close()


async def test_poison_takes_two_engines_and_nobody_with_it() -> None:
    works = Works()
    supervisor = await works.supervisor()
    asked = [words(10 + number) for number in range(8)]
    tasks = [asyncio.create_task(answer(supervisor, ask(text))) for text in asked]
    await soon(lambda: works.engines[0].running == 8)
    poison = asyncio.create_task(answer(supervisor, ask(POISON)))
    assert await asyncio.gather(*tasks) == asked
    with pytest.raises(Invalid, match="Two engines have stopped"):
        await poison
    assert len(works.engines) <= 3
    await supervisor.close()


async def test_newcomers_that_die_with_the_poison_are_answered_too() -> None:
    works = Works()
    supervisor = await works.supervisor()
    poison = asyncio.create_task(answer(supervisor, ask(POISON)))
    await soon(lambda: len(works.engines) == 2)
    await soon(lambda: works.engines[1].running == 1)
    tasks = [asyncio.create_task(answer(supervisor, ask(words(30)))) for _ in range(5)]
    with pytest.raises(Invalid, match="Two engines have stopped"):
        await poison
    assert await asyncio.gather(*tasks) == [words(30)] * 5
    assert len(works.engines) == 3
    await supervisor.close()


async def test_a_request_that_was_rendered_in_time_waits_for_the_next_engine() -> None:
    works = Works()
    supervisor = await works.supervisor()
    request = ask(words(3))
    prompt = await supervisor.render(request, ROUTE)
    works.engines[0].die()
    await soon(lambda: supervisor._engine is not works.engines[0])
    chunks = [chunk.text async for chunk in supervisor.generate(prompt, request, ROUTE)]
    assert "".join(chunks) == words(3)
    await supervisor.close()


async def test_the_next_engine_tells_when_it_has_read_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    works = Works()
    supervisor = await works.supervisor()
    request = ask(words(30))
    prompt = replace(await supervisor.render(request, ROUTE), when_read=lambda: None)
    given: list[Prompt] = []
    generate = Mortal.generate

    def watched(self: Mortal, prompt: Prompt, request: GenerateRequest, route: Route) -> Any:
        given.append(prompt)
        return generate(self, prompt, request, route)

    monkeypatch.setattr(Mortal, "generate", watched)
    chunks = asyncio.create_task(anext(supervisor.generate(prompt, request, ROUTE)))
    await soon(lambda: works.engines[0].running == 1)
    works.engines[0].die()
    await chunks
    assert [one.when_read is prompt.when_read for one in given] == [True, True]
    await supervisor.close()


async def test_two_poisons_are_found_one_after_the_other() -> None:
    works = Works()
    supervisor = await works.supervisor()
    poisons = [asyncio.create_task(answer(supervisor, ask(POISON))) for _ in range(2)]
    good = [asyncio.create_task(answer(supervisor, ask(words(30)))) for _ in range(4)]
    for poison in poisons:
        with pytest.raises(Invalid, match="Two engines have stopped"):
            await poison
    assert await asyncio.gather(*good) == [words(30)] * 4
    assert len(works.engines) <= 4, "one death together, and one for each"
    await supervisor.close()


async def test_poison_that_arrives_beside_a_suspect_is_not_taken_for_it() -> None:
    works = Works()
    supervisor = await works.supervisor()
    suspect = asyncio.create_task(answer(supervisor, ask(words(40))))
    await soon(lambda: works.engines[0].running == 1)
    works.engines[0].die()
    await soon(lambda: len(works.engines) == 2 and works.engines[1].running == 1)
    poison = asyncio.create_task(answer(supervisor, ask(POISON)))
    assert await suspect == words(40)
    with pytest.raises(Invalid, match="Two engines have stopped"):
        await poison
    await supervisor.close()


async def test_the_end_of_the_server_accuses_nobody() -> None:
    works = Works()
    supervisor = await works.supervisor()
    suspect = asyncio.create_task(answer(supervisor, ask(words(300))))
    await soon(lambda: works.engines[0].running == 1)
    works.engines[0].die()
    await soon(lambda: len(works.engines) == 2 and works.engines[1].running == 1)
    await supervisor.close()
    with pytest.raises(Unavailable):
        await suspect


async def test_a_hang_that_ended_by_itself_holds_nobody_for_ever() -> None:
    works = Works()
    supervisor = await works.supervisor()
    # As a request does that saw it before the supervisor's own check, which then passes.
    supervisor._detector.engine_lost(supervisor._generation)
    async with asyncio.timeout(60):
        await TrackedRequest(supervisor._detector, "id", bytes).wait_for_turn()
    assert len(works.engines) == 1
    await supervisor.close()


@pytest.mark.parametrize("error", [StartupError, OSError, ValueError])
async def test_any_failure_of_a_rebuild_is_tried_again(error: type[Exception]) -> None:
    works = Works(fail=lambda number: number in (2, 3), error=error)
    supervisor = await works.supervisor()
    task = asyncio.create_task(answer(supervisor, ask(words(20))))
    await soon(lambda: works.engines[0].running == 1)
    works.engines[0].die()
    assert await task == words(20)
    assert works.tries == 4
    await supervisor.close()


async def test_an_engine_that_cannot_be_closed_is_replaced_all_the_same() -> None:
    works = Works()
    supervisor = await works.supervisor()

    async def fail() -> None:
        raise PermissionError("no")

    works.engines[0].close = fail  # type: ignore[method-assign]
    works.engines[0].die()
    await soon(lambda: is_up(supervisor, works, 2))
    await supervisor.close()


async def test_a_supervisor_that_fails_itself_gives_up() -> None:
    works = Works()
    supervisor = await works.supervisor()

    async def fail() -> None:
        raise RuntimeError("a bug")

    works.engines[0].check = fail  # type: ignore[method-assign]
    async with asyncio.timeout(60):
        await supervisor.gave_up.wait()
    await supervisor.close()


async def test_a_hang_is_noticed_and_ends_the_engine() -> None:
    works = Works()
    supervisor = await works.supervisor()
    task = asyncio.create_task(answer(supervisor, ask(words(300))))
    await soon(lambda: works.engines[0].running == 1)
    before = failures(works, "hung")
    works.engines[0].hangs = True
    await soon(lambda: len(works.engines) == 2)
    assert failures(works, "hung") == before + 1
    assert await task == words(300)
    await supervisor.close()


async def test_while_there_is_no_engine_requests_are_refused_with_a_time() -> None:
    works = Works(fail=lambda number: number > 1)
    supervisor = await works.supervisor(max_restarts=100, backoff_s=0.05)
    works.engines[0].die()
    with pytest.raises(EngineDied):
        await works.engines[0].check()
    await soon(lambda: works.tries > 2)
    with pytest.raises(Unavailable, match="being rebuilt") as caught:
        await supervisor.render(ask("hi"), ROUTE)
    assert 1 <= caught.value.retry_after_s <= 60
    with pytest.raises(Unavailable):
        await supervisor.check()
    await supervisor.close()


async def test_it_gives_up_after_its_limit_and_tells_who_waits() -> None:
    works = Works(fail=lambda number: number > 1)
    supervisor = await works.supervisor(max_restarts=3)
    task = asyncio.create_task(answer(supervisor, ask(words(300))))
    await soon(lambda: works.engines[0].running == 1)
    works.engines[0].die()
    async with asyncio.timeout(60):
        await supervisor.gave_up.wait()
    assert works.tries == 1 + 3
    with pytest.raises(Unavailable, match="for good"):
        await task
    await supervisor.close()


async def test_a_rebuild_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails once its processes are gone, and the next one is tried."""
    gone = threading.Event()
    monkeypatch.setattr("packhorse.serve.engines.supervisor.end_unclaimed_children", gone.set)
    works = Works(fail=lambda number: number == 2 and gone.wait(10))
    supervisor = await works.supervisor(build_timeout_s=0.1)
    works.engines[0].die()
    await soon(lambda: is_up(supervisor, works, 2))
    assert works.tries == 3
    await supervisor.close()


async def test_a_rebuild_that_cannot_be_ended_is_the_servers_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not another one beside it: there could be two engines in the end."""
    released = threading.Event()
    monkeypatch.setattr("packhorse.serve.engines.supervisor.end_unclaimed_children", lambda: None)
    monkeypatch.setattr("packhorse.serve.engines.supervisor.UNWIND_S", 0.2)
    works = Works(fail=lambda number: number == 2 and released.wait(10))
    supervisor = await works.supervisor(build_timeout_s=0.1)
    works.engines[0].die()
    async with asyncio.timeout(60):
        await supervisor.gave_up.wait()
    await supervisor.close()
    assert supervisor.is_stuck
    assert works.tries == 2
    released.set()


async def test_old_failures_are_forgotten() -> None:
    works = Works()
    supervisor = await works.supervisor(max_restarts=1, restart_window_s=0.1)
    for number in range(1, 4):
        works.engines[-1].die()
        await soon(lambda number=number: is_up(supervisor, works, number + 1))  # type: ignore[misc]
        await asyncio.sleep(0.12)
    assert not supervisor.gave_up.is_set()
    await supervisor.close()


async def test_close_ends_what_runs_and_what_waits() -> None:
    works = Works(fail=lambda number: number > 1)
    supervisor = await works.supervisor(max_restarts=100, backoff_s=30.0)
    waits = asyncio.create_task(answer(supervisor, ask(words(300))))
    await soon(lambda: works.engines[0].running == 1)
    works.engines[0].die()
    await soon(lambda: works.tries == 2)
    await supervisor.close()
    with pytest.raises(Unavailable):
        await waits
    assert works.metrics.requests_waiting_for_engine() == 0


async def test_a_caller_that_leaves_while_held_is_forgotten() -> None:
    works = Works(fail=lambda number: number == 2)
    supervisor = await works.supervisor(max_restarts=100, backoff_s=0.1)
    leaves = asyncio.create_task(answer(supervisor, ask(words(300))))
    stays = asyncio.create_task(answer(supervisor, ask(words(20))))
    await soon(lambda: works.engines[0].running == 2)
    works.engines[0].die()
    await soon(lambda: works.metrics.requests_waiting_for_engine() == 2)
    leaves.cancel()
    assert await stays == words(20)
    assert works.metrics.requests_waiting_for_engine() == 0
    await supervisor.close()


def failures(works: Works, reason: str) -> float:
    counters: Sequence[object] = list(works.metrics.engine_failures.collect())
    return sum(
        sample.value
        for metric in counters
        for sample in metric.samples  # type: ignore[attr-defined]
        if sample.name.endswith("_total") and sample.labels == {"reason": reason}
    )
