"""The service over the echo engine: what start() refuses, what a stream counts, how the drain
waits.
"""

from __future__ import annotations

import asyncio

import pytest

from serve.engines.echo import EchoEngine
from serve.errors import Internal, Invalid, Unavailable, UnknownModel
from serve.messages import GenerateRequest, Sampling
from serve.service import Service
from serve.settings import EngineSettings


def ask(text: str, *, model: str = "echo", max_tokens: int | None = None) -> GenerateRequest:
    sampling = Sampling(max_tokens=max_tokens)
    return GenerateRequest("id", model, sampling, messages=({"role": "user", "content": text},))


def make_service(delay_s: float = 0) -> tuple[Service, EchoEngine]:
    engine = EchoEngine(EngineSettings(kind="echo", echo_delay_s=delay_s))
    service = Service("echo")
    service.attach(engine)
    return service, engine


async def text_of(service: Service, request: GenerateRequest) -> str:
    stream = await service.start(request)
    return "".join([chunk.text async for chunk in stream])


async def test_a_stream_gives_text_and_usage() -> None:
    service, _ = make_service()
    stream = await service.start(ask("one two three"))
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == "one two three"
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "stop"]
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens) == (3, 3)


async def test_max_tokens_ends_with_length() -> None:
    service, _ = make_service()
    stream = await service.start(ask("one two three", max_tokens=2))
    assert [chunk.finish_reason async for chunk in stream] == [None, "length"]


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (ask("hi", model="gpt"), UnknownModel, "no model 'gpt' here; this server has 'echo'"),
        (ask("w " * 3000), Invalid, "3000 tokens, which leaves no room"),
        (ask(""), Invalid, "prompt is empty"),
        (ask("!dead"), Unavailable, "asked to fail"),
        (ask("!bug"), Internal, "request id"),
    ],
)
async def test_start_refuses_and_forgets(
    request_: GenerateRequest, error: type[Exception], message: str
) -> None:
    service, engine = make_service()
    with pytest.raises(error, match=message):
        await service.start(request_)
    assert engine.running == 0
    assert await service.drain(0.1)


@pytest.mark.parametrize(
    ("text", "error"), [("!dead-later", Unavailable), ("!bug-later", Internal)]
)
async def test_a_failure_after_the_first_chunk_ends_the_stream(
    text: str, error: type[Exception]
) -> None:
    service, engine = make_service()
    stream = await service.start(ask(text))
    with pytest.raises(error):
        [chunk async for chunk in stream]
    assert engine.running == 0
    assert await service.drain(0.1)


async def test_closing_a_stream_aborts_the_engine() -> None:
    service, engine = make_service(delay_s=0.01)
    stream = await service.start(ask("a b c d e f"))
    assert engine.running == 1
    await stream.close()
    await stream.close()
    assert (engine.running, engine.aborted) == (0, 1)
    assert await service.drain(0.1)


async def test_cancelling_start_aborts_the_engine() -> None:
    service, engine = make_service(delay_s=30)
    task = asyncio.create_task(service.start(ask("a b")))
    await asyncio.sleep(0)  # one turn of the loop is enough to reach the engine's pause
    assert engine.running == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.running == 0
    assert await service.drain(0.1)


async def test_draining_refuses_new_requests_and_waits_for_old_ones() -> None:
    service, _ = make_service(delay_s=0.01)
    stream = await service.start(ask("a b c d"))
    await service.check_ready()
    service.stop_admitting()
    with pytest.raises(Unavailable):
        await service.start(ask("late"))
    with pytest.raises(Unavailable):
        await service.check_ready()
    assert not await service.drain(0.001)
    drained = asyncio.create_task(service.drain(30))
    assert "".join([chunk.text async for chunk in stream]) == "a b c d"
    assert await drained


async def test_a_dead_engine_is_not_ready() -> None:
    service, engine = make_service()
    await engine.close()
    with pytest.raises(Unavailable):
        await service.check_ready()


async def test_before_the_engine_is_there_the_answer_is_not_yet() -> None:
    service = Service("echo")
    with pytest.raises(Unavailable, match="still loading"):
        await service.start(ask("hi"))
    with pytest.raises(Unavailable, match="still loading"):
        await service.check_ready()


async def test_a_finished_stream_is_no_abort() -> None:
    service, engine = make_service()
    stream = await service.start(ask("a b"))
    assert [chunk.text async for chunk in stream] == ["a", " b"]
    await stream.close()
    assert engine.aborted == 0


async def test_a_default_length_gives_way_to_a_long_prompt() -> None:
    service, _ = make_service()
    sampling = Sampling(default_max_tokens=16)
    text = "w " * 2040
    stream = await service.start(GenerateRequest("id", "echo", sampling, prompt=text))
    assert len([chunk async for chunk in stream]) == 8
