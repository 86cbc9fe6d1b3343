"""The pipeline over the echo engine: what start() refuses, what a stream counts, how the drain
waits.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.errors import (
    DeadlineExceeded,
    Internal,
    Invalid,
    Overloaded,
    Unavailable,
    UnknownModel,
)
from packhorse.serve.limits.admission import Admission
from packhorse.serve.messages import Caller, GenerateRequest, Prompt, Sampling
from packhorse.serve.models import Model, Models
from packhorse.serve.pipeline import Pipeline, merged
from packhorse.serve.settings.admission import AdmissionSettings
from packhorse.serve.settings.engine import EngineSettings
from tests.client import request_lines


def ask(text: str, *, model: str = "echo", max_tokens: int | None = None) -> GenerateRequest:
    sampling = Sampling(max_tokens=max_tokens)
    return GenerateRequest("id", model, sampling, messages=({"role": "user", "content": text},))


def over(engine: Any, admission: Admission | None = None, **options: float) -> Pipeline:
    model = Model("echo", admission=admission)
    model.attach(engine)
    return Pipeline(Models(model), **options)


def make_pipeline(delay_s: float = 0, **limits: Any) -> tuple[Pipeline, EchoEngine]:
    engine = EchoEngine(EngineSettings(kind="echo", echo_delay_s=delay_s))
    return over(engine, admission=Admission(AdmissionSettings(**limits))), engine


async def text_of(pipeline: Pipeline, request: GenerateRequest) -> str:
    stream = await pipeline.start(request)
    return "".join([chunk.text async for chunk in stream])


async def test_a_stream_gives_text_and_usage() -> None:
    pipeline, _ = make_pipeline()
    stream = await pipeline.start(ask("one two three"))
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == "one two three"
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "stop"]
    assert (stream.context.usage.prompt_tokens, stream.context.usage.completion_tokens) == (3, 3)


async def test_max_tokens_ends_with_length() -> None:
    pipeline, _ = make_pipeline()
    stream = await pipeline.start(ask("one two three", max_tokens=2))
    assert [chunk.finish_reason async for chunk in stream] == [None, "length"]


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (ask("hi", model="gpt"), UnknownModel, "no model 'gpt' here; this server has 'echo'"),
        (ask("w " * 3000), Invalid, "your prompt has 3000, which leaves no room"),
        (ask(""), Invalid, "prompt is empty"),
        (ask("!dead"), Unavailable, "asked to fail"),
        (ask("!bug"), Internal, "request id"),
    ],
)
async def test_start_refuses_and_forgets(
    request_: GenerateRequest, error: type[Exception], message: str
) -> None:
    pipeline, engine = make_pipeline()
    with pytest.raises(error, match=message):
        await pipeline.start(request_)
    assert engine.running == 0
    assert await pipeline.drain(10)


@pytest.mark.parametrize(
    ("text", "error"), [("!dead-later", Unavailable), ("!bug-later", Internal)]
)
async def test_a_failure_after_the_first_chunk_ends_the_stream(
    text: str, error: type[Exception]
) -> None:
    pipeline, engine = make_pipeline()
    stream = await pipeline.start(ask(text))
    with pytest.raises(error):
        [chunk async for chunk in stream]
    assert engine.running == 0
    assert await pipeline.drain(10)


async def test_closing_a_stream_aborts_the_engine() -> None:
    pipeline, engine = make_pipeline(delay_s=0.01)
    stream = await pipeline.start(ask("a b c d e f"))
    assert engine.running == 1
    await stream.close()
    await stream.close()
    assert (engine.running, engine.aborted) == (0, 1)
    assert await pipeline.drain(10)


async def test_cancelling_start_aborts_the_engine() -> None:
    pipeline, engine = make_pipeline(delay_s=30)
    task = asyncio.create_task(pipeline.start(ask("a b")))
    await asyncio.sleep(0)  # one turn of the loop is enough to reach the engine's pause
    assert engine.running == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.running == 0
    assert await pipeline.drain(10)


async def test_draining_refuses_new_requests_and_waits_for_old_ones() -> None:
    pipeline, _ = make_pipeline(delay_s=0.01)
    stream = await pipeline.start(ask("a b c d"))
    await pipeline.check_ready()
    pipeline.stop_admitting()
    with pytest.raises(Unavailable):
        await pipeline.start(ask("late"))
    with pytest.raises(Unavailable):
        await pipeline.check_ready()
    assert not await pipeline.drain(0.001)
    drained = asyncio.create_task(pipeline.drain(30))
    assert "".join([chunk.text async for chunk in stream]) == "a b c d"
    assert await drained


async def test_a_dead_engine_is_not_ready() -> None:
    pipeline, engine = make_pipeline()
    await engine.close()
    with pytest.raises(Unavailable):
        await pipeline.check_ready()


async def test_before_the_engine_is_there_the_answer_is_not_yet() -> None:
    pipeline = Pipeline(Models(Model("echo")))
    with pytest.raises(Unavailable, match="still loading"):
        await pipeline.start(ask("hi"))
    with pytest.raises(Unavailable, match="still loading"):
        await pipeline.check_ready()


async def test_a_finished_stream_is_no_abort() -> None:
    pipeline, engine = make_pipeline()
    stream = await pipeline.start(ask("a b"))
    assert [chunk.text async for chunk in stream] == ["a", " b"]
    await stream.close()
    assert engine.aborted == 0


async def test_a_default_length_gives_way_to_a_long_prompt() -> None:
    pipeline, _ = make_pipeline()
    sampling = Sampling(default_max_tokens=16)
    text = "w " * 2040
    stream = await pipeline.start(GenerateRequest("id", "echo", sampling, prompt=text))
    assert len([chunk async for chunk in stream]) == 8


LIMITED = Caller("batch", "acme", frozenset({"inference"}), tokens_per_minute=100)


def idle(pipeline: Pipeline) -> bool:
    counted = pipeline.models.first.admission
    return (counted.running, counted.waiting, counted.queued_tokens) == (0, 0, 0)


async def test_what_the_engine_has_no_room_for_is_refused() -> None:
    pipeline, engine = make_pipeline(delay_s=0.01, max_in_engine=1)
    stream = await pipeline.start(ask("a b c"))
    with pytest.raises(Overloaded):  # before it is rendered: nobody looks whether it is good
        await pipeline.start(ask(""))
    with pytest.raises(Overloaded, match="limit of 1"):
        await pipeline.start(ask("a b c"))
    with pytest.raises(Overloaded):
        await pipeline.start_all([ask("a"), ask("b")])
    assert engine.running == 1
    assert [chunk.text async for chunk in stream] == ["a", " b", " c"]
    assert idle(pipeline)
    assert await text_of(pipeline, ask("a b c")) == "a b c"


async def test_waiting_ends_with_the_first_chunk() -> None:
    pipeline, _ = make_pipeline(delay_s=0.01)
    stream = await pipeline.start(ask("a b c"))
    counted = pipeline.models.first.admission
    assert (counted.running, counted.waiting, counted.queued_tokens) == (1, 0, 0)
    starting = asyncio.create_task(pipeline.start(ask("a b c")))
    await asyncio.sleep(0)
    assert (counted.running, counted.waiting, counted.queued_tokens) == (2, 1, 3)
    starting.cancel()
    await stream.close()
    await asyncio.wait([starting])
    assert idle(pipeline)


@pytest.mark.parametrize("text", ["one two", "!dead", "!bug", "!dead-later", "!bug-later", ""])
async def test_however_a_request_ends_it_is_counted_out(text: str) -> None:
    pipeline, _ = make_pipeline()
    for several in (1, 2):
        try:
            streams = await pipeline.start_all([ask(text)] * several)
            async for _ in merged(streams):
                pass
        except (Unavailable, Internal, Invalid):
            pass
    assert idle(pipeline)
    assert await pipeline.drain(10)


async def test_a_fault_of_ours_is_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, _ = make_pipeline()

    def broken(*_: Any) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(pipeline, "_admit", broken)
    counted = pipeline.models.first.metrics.requests.labels("internal")
    before = counted._value.get()
    with pytest.raises(RuntimeError):
        await pipeline.start(ask("hello"))
    assert counted._value.get() == before + 1
    assert idle(pipeline)


async def test_a_quota_is_charged_what_was_used_and_nothing_for_the_servers_faults() -> None:
    pipeline, _ = make_pipeline()
    request = replace(ask("a b", max_tokens=98), caller=LIMITED)
    for text in ("!dead", "!bug"):
        with pytest.raises((Unavailable, Internal)):
            await text_of(pipeline, replace(ask(text, max_tokens=90), caller=LIMITED))
    assert await text_of(pipeline, request) == "a b"
    with pytest.raises(Overloaded, match="96 left of its 100 per minute"):
        await text_of(pipeline, request)


async def never() -> None:
    await asyncio.Event().wait()


class Stuck(EchoEngine):
    """Waits for ever in one step of its work; `stubborn` makes nothing of a cancellation."""

    def __init__(self, where: str, *, stubborn: bool = False) -> None:
        super().__init__(EngineSettings(kind="echo"))
        self.where = where
        self.stubborn = stubborn

    async def hang(self) -> None:
        try:
            await never()
        except asyncio.CancelledError:
            if not self.stubborn:
                raise

    async def render(self, *arguments: Any) -> Any:
        if self.where == "render":
            await self.hang()
        return await super().render(*arguments)

    async def generate(self, *arguments: Any) -> Any:
        if self.where == "first":
            await self.hang()
        async with aclosing(super().generate(*arguments)) as chunks:
            async for chunk in chunks:
                yield chunk
                if self.where == "later":
                    await self.hang()


def stuck_service(where: str, *, stubborn: bool = False) -> tuple[Pipeline, Stuck]:
    engine = Stuck(where, stubborn=stubborn)
    pipeline = over(engine, max_request_timeout_s=100)
    return pipeline, engine


def soon(text: str = "a b c", timeout_s: float = 0.03) -> GenerateRequest:
    return replace(ask(text), timeout_s=timeout_s)


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("several", [1, 2])
@pytest.mark.parametrize("where", ["render", "first", "later"])
async def test_a_request_ends_at_its_deadline_wherever_it_is(
    where: str, several: int, stubborn: bool
) -> None:
    pipeline, engine = stuck_service(where, stubborn=stubborn)

    async def whole() -> None:
        async for _ in merged(await pipeline.start_all([soon()] * several)):
            pass

    with pytest.raises(DeadlineExceeded, match=r"longer than its 0\.03 s"):
        await whole()
    assert engine.running == 0
    assert idle(pipeline)
    assert await pipeline.drain(10)
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0
    async with asyncio.timeout(10):  # nothing is left that a later cancellation would stumble over
        await asyncio.sleep(0)


async def test_a_deadline_does_not_disturb_what_the_caller_does_with_a_chunk() -> None:
    pipeline, engine = make_pipeline()
    stream = await pipeline.start(soon("a b c", timeout_s=0.5))
    seen = []

    async def slowly() -> None:
        async for chunk in stream:
            await asyncio.sleep(0.6)  # longer than there is, and not interrupted
            seen.append(chunk.text)

    with pytest.raises(DeadlineExceeded):
        await slowly()
    assert seen == ["a"]
    assert engine.running == 0


async def test_who_is_cancelled_at_the_deadline_stays_cancelled() -> None:
    pipeline, _ = stuck_service("first")
    starting = asyncio.create_task(pipeline.start(soon(timeout_s=0.02)))
    await asyncio.sleep(0)
    time.sleep(0.03)  # noqa: ASYNC251 the timer is due, and the loop has not seen it yet
    asyncio.get_running_loop().call_soon(starting.cancel)
    with pytest.raises((asyncio.CancelledError, DeadlineExceeded)):
        await starting
    assert idle(pipeline)


async def test_a_request_within_its_time_is_not_touched() -> None:
    pipeline, _ = make_pipeline(delay_s=0.01)
    assert await text_of(pipeline, soon("a b", timeout_s=5)) == "a b"
    assert await pipeline.drain(10)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, 101.0, float("inf"), float("nan")])
async def test_a_timeout_beyond_the_servers_own_is_refused(timeout_s: float) -> None:
    pipeline, _ = stuck_service("nowhere")
    with pytest.raises(Invalid, match=r"at most this server's 100"):
        await pipeline.start(soon(timeout_s=timeout_s))


async def test_the_servers_own_timeout_is_for_requests_that_say_nothing() -> None:
    engine = Stuck("first")
    pipeline = over(engine, request_timeout_s=0.02)
    with pytest.raises(DeadlineExceeded):
        await pipeline.start(ask("a"))


async def test_the_log_line_names_the_key_and_its_tenant(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pipeline, _ = make_pipeline()
    await text_of(pipeline, replace(ask("a", max_tokens=1), caller=LIMITED))
    (line,) = request_lines(caplog)
    assert (line["key"], line["tenant"], line["outcome"]) == ("batch", "acme", "ok")


@pytest.mark.parametrize("name", ["echo", "an-adapter-that-is-not-there-yet"])
async def test_while_the_engine_loads_no_name_is_judged(name: str) -> None:
    pipeline = Pipeline(Models(Model("echo")))
    with pytest.raises(Unavailable, match="still loading"):
        await pipeline.start(ask("hi", model=name))
    assert await pipeline.drain(10)


class Reads(EchoEngine):
    """Says when it has read a prompt, and answers when it is told to."""

    def __init__(self) -> None:
        super().__init__(EngineSettings(kind="echo"))
        self.may_read, self.may_answer = asyncio.Event(), asyncio.Event()

    async def generate(self, prompt: Prompt, request: Any, route: Any) -> Any:
        await self.may_read.wait()
        if prompt.when_read is not None:
            prompt.when_read()
            prompt.when_read()
        await self.may_answer.wait()
        async for chunk in super().generate(prompt, request, route):
            yield chunk


@pytest.mark.parametrize("has_cache", [False, True])
async def test_a_whole_answer_waits_only_until_its_prompt_is_read(has_cache: bool) -> None:
    engine = Reads()
    pipeline = over(engine)
    if has_cache:
        pipeline.models.first.cache = ResultCache(
            b"secret", memory_bytes=10**6, max_entry_bytes=10**5, ttl_s=60
        )
    admission = pipeline.models.first.admission
    request = replace(ask("a b c"), stream=False, sampling=Sampling(temperature=0.0))
    starting = asyncio.create_task(pipeline.start(request))
    while not admission.running:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert (admission.waiting, admission.queued_tokens) == (1, 3)
    engine.may_read.set()
    for _ in range(10):
        await asyncio.sleep(0)
    assert (admission.running, admission.waiting, admission.queued_tokens) == (1, 0, 0)
    engine.may_answer.set()
    stream = await starting
    assert [chunk.text async for chunk in stream]
    assert (admission.running, admission.waiting, admission.queued_tokens) == (0, 0, 0)
    metrics = pipeline.models.first.metrics
    assert metrics.prompt_tokens._value.get() == 3
