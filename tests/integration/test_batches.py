"""Several prompts in one call, and several choices: shapes, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.errors import Invalid, Unavailable
from packhorse.serve.messages import GenerateRequest, Sampling
from packhorse.serve.models import Model, Models
from packhorse.serve.pipeline import Pipeline, merged
from packhorse.serve.settings.engine import EngineSettings
from tests.client import TEXT, events, metric, wait_for
from tests.conftest import Server
from tests.integration.serving import until


@pytest.fixture
def http(echo_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=echo_server.url, timeout=30) as client:
        yield client


def complete(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": prompt, **fields}


def texts(choices: list[dict[str, Any]]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for choice in choices:
        joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


@pytest.mark.parametrize("n", [1, 2])
def test_choices_are_numbered_prompt_by_prompt(http: httpx.Client, n: int) -> None:
    body = complete(["a b", "c", "d e f"], n=n)
    whole = http.post(TEXT, json=body).json()
    expected = dict(enumerate(text for text in ["a b", "c", "d e f"] for _ in range(n)))
    assert texts(whole["choices"]) == expected
    assert whole["usage"]["prompt_tokens"] == 6
    assert whole["usage"]["completion_tokens"] == 6 * n
    streamed = events(
        http.post(TEXT, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    )
    assert texts([choice for event in streamed for choice in event["choices"]]) == expected
    assert streamed[-1]["usage"] == whole["usage"]
    reasons = [c["finish_reason"] for event in streamed for c in event["choices"]]
    assert reasons.count("stop") == 3 * n


def test_one_bad_prompt_refuses_the_call(http: httpx.Client) -> None:
    for stream in (False, True):
        response = http.post(TEXT, json=complete(["a", "w " * 3000], stream=stream))
        assert response.status_code == 400
        assert "your prompt has 3000" in response.json()["error"]["message"]


def test_a_failure_in_one_stream_ends_the_call_with_it(http: httpx.Client) -> None:
    response = http.post(TEXT, json=complete(["a b c", "!dead-later"], stream=True))
    assert response.status_code == 200
    assert '"kind": "unavailable"' in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    assert http.post(TEXT, json=complete(["a b c", "!dead-later"])).status_code == 503
    wait_for(lambda: metric(http, "packhorse_requests_in_flight") == 0)


class SlowEngine(EchoEngine):
    """Prompts that begin with `slow` wait for `go` before their first word."""

    def __init__(self) -> None:
        super().__init__(EngineSettings(kind="echo"))
        self.go = asyncio.Event()
        self.slow = 0

    async def generate(self, prompt: Any, request: Any, route: Any) -> Any:
        if str(prompt.text).startswith("slow"):
            self.slow += 1
            await self.go.wait()
        async for chunk in super().generate(prompt, request, route):
            yield chunk


def requests(*prompts: str) -> list[GenerateRequest]:
    return [
        GenerateRequest(f"id-{number}", "echo", Sampling(), prompt=prompt, stream=True)
        for number, prompt in enumerate(prompts)
    ]


def slow_pipeline() -> tuple[Pipeline, SlowEngine]:
    engine = SlowEngine()
    model = Model("echo")
    model.attach(engine)
    return Pipeline(Models(model)), engine


async def test_a_ready_prompt_does_not_wait_for_a_slow_one() -> None:
    pipeline, engine = slow_pipeline()
    streams = await pipeline.start_all(requests("slow one", "fast"))
    chunks = merged(streams)
    assert (await anext(chunks))[0] == 1
    engine.go.set()
    assert [chunk.text async for _, chunk in chunks] == ["slow", " one"]
    assert await pipeline.drain(10)


async def test_a_bad_prompt_is_found_before_any_is_generated() -> None:
    pipeline, engine = slow_pipeline()
    with pytest.raises(Invalid):
        await pipeline.start_all(requests("fast", "slow", "w " * 3000))
    assert engine.running == 0
    assert await pipeline.drain(10)


async def test_a_caller_that_leaves_while_a_batch_starts_leaves_nothing() -> None:
    pipeline, engine = slow_pipeline()
    starting = asyncio.create_task(pipeline.start_all(requests("slow one", "slow two")))
    await until(lambda: engine.slow == 2)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await pipeline.drain(10)


async def test_a_stream_that_fails_to_open_ends_the_others() -> None:
    pipeline, engine = slow_pipeline()
    streams = await pipeline.start_all(requests("fast one", "slow one", "!dead-later"))
    with pytest.raises(Unavailable):
        [item async for item in merged(streams)]
    for stream in streams:
        await stream.close()
    assert engine.running == 0
    assert await pipeline.drain(10)
