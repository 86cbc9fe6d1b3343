"""Overload, quotas, deadlines and clients that do not read, over HTTP."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from openai import AsyncOpenAI, InternalServerError

from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.errors import Overloaded
from packhorse.serve.messages import Chunk
from packhorse.serve.rest.errors import error_response
from packhorse.serve.settings.engine import EngineSettings
from tests.client import CHAT, TEXT, events, hello
from tests.integration.serving import (
    Served,
    bearer,
    nothing_left,
    serving,
    until,
    write_keys,
)


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def retry_after(response: httpx.Response) -> int:
    assert response.json()["error"]["kind"] == "overloaded"
    return int(response.headers["retry-after"])


async def post_head(server: Served, length: int, body: bytes = b"") -> Any:
    """A POST whose body is not sent, or not all of it: (reader, writer)."""
    reader, writer = await asyncio.open_connection(*server.address)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def test_above_the_limit_calls_are_refused_before_their_bodies_are_read() -> None:
    async with serving(limits={"max_in_flight": 2}) as server:
        counted = server.pipeline.admission
        held = [await post_head(server, 100) for _ in range(2)]
        await until(lambda: counted.in_flight == 2)
        reader, writer = await post_head(server, 1000, b"{ this is not even JSON")
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert b"429 Too Many Requests" in answer
        assert b"retry-after: 1\r\n" in answer
        assert (await server.http.get("/health/ready")).status_code == 200
        assert (await server.http.get("/v1/models")).status_code == 200
        held[0][1].close()
        await until(lambda: counted.in_flight == 1)
        assert (await server.http.post(CHAT, json=hello())).status_code == 200
        for _, other in (*held, (reader, writer)):
            other.close()
        await until(nothing_left(server))


async def test_a_keys_own_concurrency(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", batch={"quotas": {"max_concurrent": 1}}, other={})
    async with serving(keys=keys, delay_s=0.05) as server:
        asked = {"json": hello("a b", stream=True), "headers": bearer("batch")}
        long = {**asked, "json": hello("word " * 400, stream=True)}  # 20 s; it is left before
        async with server.http.stream("POST", CHAT, **long):
            refused = await server.http.post(CHAT, **asked)
            assert refused.status_code == 429
            assert retry_after(refused) >= 1
            other = await server.http.post(CHAT, json=hello("a"), headers=bearer("other"))
            assert other.status_code == 200
        await until(nothing_left(server))
        assert (await server.http.post(CHAT, **asked)).status_code == 200


async def test_a_spent_quota_says_how_long_to_wait(tmp_path: Path) -> None:
    clock = Clock()
    keys = write_keys(tmp_path / "keys.yaml", batch={"quotas": {"tokens_per_minute": 60}})
    async with serving(keys=keys, clock=clock) as server:
        asked = {"json": hello("w " * 20, max_tokens=20), "headers": bearer("batch")}
        first = await server.http.post(CHAT, **asked)
        assert first.json()["usage"]["total_tokens"] == 40
        refused = await server.http.post(CHAT, **asked)
        assert refused.status_code == 429
        wait_s = retry_after(refused)
        assert wait_s == 20  # it has 20 left, wants 40, and gets one a second
        clock.now_s += wait_s - 1
        assert retry_after(await server.http.post(CHAT, **asked)) == 1
        clock.now_s += 1
        assert (await server.http.post(CHAT, **asked)).status_code == 200


async def test_what_was_not_used_is_given_back(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", batch={"quotas": {"tokens_per_minute": 600}})
    async with serving(keys=keys, clock=Clock()) as server:
        asked = {"json": hello(max_tokens=500), "headers": bearer("batch")}
        for _ in range(5):  # each may take 503 tokens, and takes 6
            assert (await server.http.post(CHAT, **asked)).status_code == 200


async def test_a_burst_is_answered_or_refused_and_nothing_else() -> None:
    async with serving(limits={"max_in_engine": 8}, delay_s=0.01) as server:
        kinds = [number % 2 == 0 for number in range(100)]
        calls = [server.http.post(CHAT, json=hello("a b c", stream=stream)) for stream in kinds]
        responses = await asyncio.gather(*calls)
        statuses = [response.status_code for response in responses]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 8
        for stream, response in zip(kinds, responses, strict=True):
            if response.status_code == 429:
                assert 1 <= retry_after(response) <= 60
            elif stream:
                assert events(response)[-1]["choices"][0]["finish_reason"] == "stop"
        await until(nothing_left(server))
        assert (await server.http.post(CHAT, json=hello())).status_code == 200


async def test_the_engine_never_has_more_than_its_limit() -> None:
    async with serving(limits={"max_in_engine": 8}, delay_s=0.01) as server:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, server.engine.running)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        await asyncio.gather(
            *(server.http.post(CHAT, json=hello("a b c", stream=True)) for _ in range(50))
        )
        watching.cancel()
        assert 0 < most <= 8


async def test_the_gauges_tell_what_waits() -> None:
    async with serving(delay_s=30) as server:
        call = asyncio.create_task(server.http.post(CHAT, json=hello("a b c")))
        await until(lambda: server.engine.running == 1)
        text = (await server.http.get("/metrics")).text
        assert 'packhorse_requests_waiting{model="echo"} 1.0' in text
        assert 'packhorse_queued_tokens{model="echo"} 3.0' in text
        call.cancel()
        await until(nothing_left(server))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"timeout_s": 0.1}, {}),
        ({}, {"x-request-timeout-s": "0.1"}),
        ({"timeout_s": 500}, {"x-request-timeout-s": "0.1"}),
        ({"timeout_s": 0.1}, {"x-request-timeout-s": "500"}),
    ],
)
async def test_a_request_that_waits_past_its_deadline_is_a_504(
    stream: bool, fields: dict[str, Any], headers: dict[str, str]
) -> None:
    async with serving(delay_s=30) as server:
        body = hello(stream=stream, **fields)
        response = await server.http.post(CHAT, json=body, headers=headers)
        assert response.status_code == 504
        assert response.json()["error"]["kind"] == "deadline"
        assert "longer than its 0.1 s" in response.json()["error"]["message"]
        # Sent again, it would take as long again.
        assert "retry-after" not in response.headers
        assert response.headers["x-should-retry"] == "false"
        await until(nothing_left(server))


async def test_openais_client_does_not_send_a_deadline_again() -> None:
    async with (
        serving(delay_s=30) as server,
        AsyncOpenAI(base_url=server.listeners.url + "/v1", api_key="-", max_retries=2) as client,
    ):
        with pytest.raises(InternalServerError) as failed:
            await client.completions.create(
                model="echo", prompt="one", extra_body={"timeout_s": 0.1}
            )
    assert failed.value.status_code == 504
    counted = server.pipeline.models.first.metrics.requests.labels("deadline")
    assert counted._value.get() == 1


class Halting(EchoEngine):
    """Says the first word at once, and nothing after it."""

    async def generate(self, *arguments: Any) -> Any:
        async for chunk in super().generate(*arguments):
            yield chunk
            await asyncio.sleep(600)


@pytest.mark.parametrize("prompts", [1, 2])
async def test_a_deadline_in_the_middle_of_a_stream_is_its_last_event(prompts: int) -> None:
    engine = Halting(EngineSettings(kind="echo"))
    async with serving(engine=engine) as server:
        body = {"model": "echo", "prompt": ["a b"] * prompts, "timeout_s": 1}
        response = await server.http.post(TEXT, json={**body, "stream": True})
        assert response.status_code == 200
        *chunks, last = events(response)
        assert chunks
        assert last["error"]["kind"] == "deadline"
        await until(nothing_left(server))
        assert (await server.http.post(TEXT, json=body)).status_code == 504


async def test_the_servers_own_deadline() -> None:
    async with serving(delay_s=30, request_timeout_s=0.05) as server:
        assert (await server.http.post(CHAT, json=hello())).status_code == 504


BAD_TIMEOUTS: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"timeout_s": 0}, {}, "timeout_s=0"),
    ({"timeout_s": -1}, {}, "timeout_s=-1"),
    ({"timeout_s": "soon"}, {}, "timeout_s"),
    ({"timeout_s": 4000}, {}, "timeout_s=4000 is not above 0 and at most this server's 3600"),
    ({}, {"x-request-timeout-s": "4000"}, "at most this server's 3600"),
    ({}, {"x-request-timeout-s": "0"}, "timeout_s=0 is not above 0"),
    ({}, {"x-request-timeout-s": "soon"}, "not a number of seconds"),
    ({}, {"x-request-timeout-s": "inf"}, "not a number of seconds"),
    ({}, {"x-request-timeout-s": "-1"}, "not a number of seconds"),
    ({}, {"x-request-timeout-s": ""}, "not a number of seconds"),
]


async def test_a_bad_timeout_is_the_requests_fault() -> None:
    async with serving() as server:
        for fields, headers, message in BAD_TIMEOUTS:
            response = await server.http.post(CHAT, json=hello(**fields), headers=headers)
            assert response.status_code == 400, (fields, headers)
            assert message in response.json()["error"]["message"]


async def test_a_body_above_the_limit_leaves_its_place() -> None:
    async with serving(http={"max_body_bytes": 1024}, limits={"max_in_flight": 1}) as server:
        for _ in range(3):
            response = await server.http.post(CHAT, content=b" " * 2000)
            assert response.status_code == 413
            assert response.json()["error"]["kind"] == "too_large"
        assert nothing_left(server)()


async def test_a_body_that_does_not_come_is_given_up() -> None:
    async with serving(http={"stalled_client_timeout_s": 0.1}) as server:
        reader, writer = await post_head(server, 100, b"{")
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert b"504 Gateway Timeout" in answer
        assert nothing_left(server)()
        writer.close()


async def test_an_idle_connection_is_closed_after_its_time_and_not_before() -> None:
    async with serving(http={"keep_alive_s": 2}) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        for _ in range(2):
            writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.1)  # idle, and much less than that time
        rest = await asyncio.wait_for(reader.read(), 60)
        assert b"HTTP" not in rest
        writer.close()


class Flood(EchoEngine):
    """Writes a great deal, fast: more than sockets buffer."""

    max_model_len = 10**9

    async def generate(self, *arguments: Any) -> Any:
        self.running += 1
        try:
            for number in range(100_000):
                yield Chunk("x" * 10_000, (number,))
                await asyncio.sleep(0)
        finally:
            self.running -= 1


async def stall(prompt: str | list[str], *, requests: int = 1) -> None:
    engine = Flood(EngineSettings(kind="echo"))
    async with serving(engine=engine, http={"stalled_client_timeout_s": 0.2}) as server:
        reader, writer = await asyncio.open_connection(*server.address, limit=1024)
        body = {"model": "echo", "prompt": prompt, "max_tokens": 10**6, "stream": True}
        content = json.dumps(body).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write((head.encode() + content) * requests)
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        await until(lambda: engine.running > 0)
        await until(nothing_left(server))
        assert server.metrics.stalled_clients._value.get() == 1
        assert (await server.http.get("/health/live")).status_code == 200
        # Really cut off: what was buffered is still there, and then no more.
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(10**9)
        writer.close()


@pytest.mark.parametrize(("prompt", "requests"), [("a", 1), ("a", 2), (["a", "b"], 1)])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_client_that_stops_reading_is_cut_off(
    loop: Any, prompt: Any, requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(stall(prompt, requests=requests))
    assert not caplog.records  # uvicorn has nothing to complain about


async def test_a_client_that_reads_slowly_is_not_cut_off() -> None:
    async with serving(delay_s=0.05, http={"stalled_client_timeout_s": 0.04}) as server:
        text = " ".join(["word"] * 6)
        response = await server.http.post(CHAT, json=hello(text, stream=True))
        said = "".join(event["choices"][0]["delta"]["content"] for event in events(response))
        assert said == text
        assert server.metrics.stalled_clients._value.get() == 0


def test_retry_after_is_never_rounded_down() -> None:
    for wait_s in (0.1, 1.0, 1.01, 59.9):
        header = error_response(Overloaded("x", retry_after_s=wait_s)).headers["retry-after"]
        assert int(header) == math.ceil(wait_s)


@pytest.mark.parametrize("temperature", [0.7, 0])
async def test_a_stream_has_its_connections_task_alone(temperature: float) -> None:
    """Also where equal requests may share its generation. Watching for a client that leaves or
    stalls takes none.
    """
    cache = ResultCache(b"s" * 32, memory_bytes=2**20, max_entry_bytes=2**16, ttl_s=60)
    async with serving(delay_s=0.05, cache=cache) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        before = asyncio.all_tasks()
        content = json.dumps(
            hello("a b c d e f g h", stream=True, temperature=temperature)
        ).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await reader.readuntil(b'"content": " b"')
        assert len(asyncio.all_tasks() - before) == 1
        await reader.readuntil(b"data: [DONE]")
        await until(lambda: asyncio.all_tasks() <= before)
        writer.close()
