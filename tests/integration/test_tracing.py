"""Spans of calls, over both protocols, into a real OTLP collector; the engine echoes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import grpc
import httpx
import pytest
from pydantic import SecretStr

from packhorse.serve.settings.tracing import TracingSettings
from packhorse.serve.telemetry.tracing import Tracing, tracing_of
from tests.client import CHAT, TEXT, hello, request_lines
from tests.collector import Collected, grpc_collector, http_collector
from tests.conftest import running_server
from tests.integration.grpc_serving import twins
from tests.integration.serving import serving
from tests.protocol_parity import as_message, metadata, method

PARENT = "4bf92f3577b34da6a3ce929d0e0e4736"
SENT = {"traceparent": f"00-{PARENT}-00f067aa0ba902b7-01", "tracestate": "vendor=1"}
STEPS = {"route", "render", "admission", "engine"}


def tracing_to(collected: Collected, **settings: Any) -> Tracing:
    return tracing_of(TracingSettings(endpoint=collected.url, **settings))


def is_sampled(response: httpx.Response) -> bool:
    """W3C's first flag; others may be set."""
    return bool(int(response.headers["traceparent"].rpartition("-")[2], 16) & 1)


@pytest.mark.parametrize(
    ("collector", "protocol"), [(grpc_collector, "grpc"), (http_collector, "http/protobuf")]
)
async def test_spans_of_a_call(
    collector: Callable[[], AbstractContextManager[Collected]],
    protocol: Literal["grpc", "http/protobuf"],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "packhorse")
    with collector() as collected:
        headers = {"api-key": SecretStr("hush")}
        tracing = tracing_to(collected, protocol=protocol, headers=headers, service_name="mine")
        async with serving(tracing=tracing) as server:
            asked = {**SENT, "x-request-id": "abc-1"}
            response = await server.http.post(CHAT, json=hello(), headers=asked)
        await tracing.close()
        spans = collected.trace(PARENT, f"POST {CHAT}")
    root = spans.pop(f"POST {CHAT}")
    assert root.parent_id == "00f067aa0ba902b7"
    assert response.headers["traceparent"] == f"00-{PARENT}-{root.span_id}-01"
    assert {path.removeprefix(f"POST {CHAT} > ") for path in spans} == STEPS
    assert all(root.start_ns <= span.start_ns <= span.end_ns for span in spans.values())
    assert all(span.end_ns <= root.end_ns for span in spans.values())
    everyone = [root, *spans.values()]
    assert {span.attributes["packhorse.request_id"] for span in everyone} == {"abc-1"}
    assert {span.service for span in everyone} == {"mine"}
    assert root.attributes["http.response.status_code"] == 200
    assert collected.headers[0]["api-key"] == "hush"
    (line,) = request_lines(caplog)
    assert (line["request_id"], line["trace_id"]) == ("abc-1", PARENT)
    assert "one two three" not in str(everyone)  # the prompt


async def test_streams_and_calls_with_several_prompts() -> None:
    with grpc_collector() as collected:
        tracing = tracing_to(collected)
        async with serving(tracing=tracing) as server:
            stream = await server.http.post(CHAT, json=hello(stream=True), headers=SENT)
            assert stream.headers["traceparent"].split("-")[1] == PARENT
            other = PARENT[::-1]
            several = {"model": "echo", "prompt": ["a b", "c d"], "max_tokens": 2}
            sent = {"traceparent": f"00-{other}-00f067aa0ba902b7-01", "x-request-id": "two"}
            await server.http.post(TEXT, json=several, headers=sent)
        await tracing.close()
        assert len(collected.trace(PARENT, f"POST {CHAT}")) == 1 + len(STEPS)
        collected.trace(other, f"POST {TEXT}")
        engines = [s for s in collected.spans if s.trace_id == other and s.name == "engine"]
    assert {span.attributes["packhorse.request_id"] for span in engines} == {"two-0", "two-1"}


async def test_a_call_that_fails() -> None:
    with grpc_collector() as collected:
        tracing = tracing_to(collected)
        async with serving(tracing=tracing) as server:
            for number, (text, status) in enumerate([("!bug", 500), ("", 400)]):
                sent = {"traceparent": f"00-{number + 1:032x}-00f067aa0ba902b7-01"}
                response = await server.http.post(CHAT, json=hello(text), headers=sent)
                assert response.status_code == status
            sent = {"traceparent": f"00-{9:032x}-00f067aa0ba902b7-01"}
            assert (await server.http.get("/v1/no/such", headers=sent)).status_code == 404
            assert (await server.http.get("/metrics", headers=SENT)).status_code == 200
        await tracing.close()
        roots = {
            number: collected.trace(f"{number:032x}", name)[name]
            for number, name in [(1, f"POST {CHAT}"), (2, f"POST {CHAT}"), (9, "GET")]
        }
        assert all(span.trace_id != PARENT for span in collected.spans)  # scrapes are no calls
    assert [roots[number].status for number in (1, 2, 9)] == [2, 0, 0]
    codes = [roots[number].attributes["http.response.status_code"] for number in (1, 2, 9)]
    assert codes == [500, 400, 404]


async def test_over_grpc(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "packhorse")
    name = "packhorse.v1.Inference/ChatStream"
    with grpc_collector() as collected:
        tracing = tracing_to(collected)
        async with twins(tracing=tracing) as both:
            called, message = as_message(CHAT, hello(stream=True))
            sent = {**SENT, "x-request-id": "abc-2"}
            call = method(both.channel, called)(message, metadata=metadata(sent))
            assert [chunk async for chunk in call]
            trailers = dict(await call.trailing_metadata())
            _, bad = as_message(CHAT, hello("!bug", stream=True))
            refused = {"traceparent": f"00-{5:032x}-00f067aa0ba902b7-01"}
            with pytest.raises(grpc.aio.AioRpcError):
                [c async for c in method(both.channel, called)(bad, metadata=metadata(refused))]
        await tracing.close()
        spans = collected.trace(PARENT, name)
        failed = collected.trace(f"{5:032x}", name)[name]
    root = spans.pop(name)
    assert {path.removeprefix(f"{name} > ") for path in spans} == STEPS
    assert trailers["traceparent"] == f"00-{PARENT}-{root.span_id}-01"
    assert trailers["x-request-id"] == root.attributes["packhorse.request_id"] == "abc-2"
    line = next(line for line in request_lines(caplog) if line["request_id"] == "abc-2")
    assert line["trace_id"] == PARENT
    assert (root.attributes["rpc.grpc.status_code"], root.status) == (0, 0)
    assert (failed.attributes["rpc.grpc.status_code"], failed.status) == (13, 2)


@pytest.mark.parametrize("damaged", ["", "00-xyz", "00-" + "0" * 32 + "-00f067aa0ba902b7-01"])
async def test_a_damaged_context_begins_a_new_trace(damaged: str) -> None:
    with grpc_collector() as collected:
        tracing = tracing_to(collected)
        async with serving(tracing=tracing) as server:
            answer = await server.http.post(CHAT, json=hello(), headers={"traceparent": damaged})
            assert answer.status_code == 200
        await tracing.close()
        trace_id = answer.headers["traceparent"].split("-")[1]
        assert collected.trace(trace_id, f"POST {CHAT}")[f"POST {CHAT}"].parent_id == ""


async def test_what_is_sent_as_state_is_joined_and_never_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is anybody's, and comes before the key is looked at."""
    with grpc_collector() as collected:
        tracing = tracing_to(collected)
        async with twins(tracing=tracing) as both:
            called, message = as_message(CHAT, hello())
            for states in (["a=1", "b=2"], ["my secret prompt text"]):
                headers = [("traceparent", SENT["traceparent"])]
                headers += [("tracestate", state) for state in states]
                answer = await both.served.http.post(CHAT, json=hello(), headers=headers)
                assert answer.status_code == 200
                assert PARENT in answer.headers["traceparent"]
                assert await method(both.channel, called)(message, metadata=headers)
        await tracing.close()
    assert "secret" not in caplog.text
    roots = [span for span in collected.spans if span.parent_id == "00f067aa0ba902b7"]
    assert sorted(span.state.replace(" ", "") for span in roots) == ["", "", "a=1,b=2", "a=1,b=2"]


async def test_what_is_not_sampled_is_not_exported() -> None:
    """The caller's own decision counts, and is handed on; without one, the ratio decides."""
    with grpc_collector() as collected:
        tracing = tracing_to(collected, sample_ratio=0)
        async with serving(tracing=tracing) as server:
            fresh = await server.http.post(CHAT, json=hello())
            told = {"traceparent": f"00-{PARENT}-00f067aa0ba902b7-00"}
            handed = await server.http.post(CHAT, json=hello(), headers=told)
            await server.http.post(CHAT, json=hello(), headers=SENT)
        await tracing.close()
        assert not is_sampled(fresh)
        assert handed.headers["traceparent"].startswith(f"00-{PARENT}-")
        assert not is_sampled(handed)
        spans = collected.trace(PARENT, f"POST {CHAT}")
    assert len(spans) == len(collected.spans) == 1 + len(STEPS)


async def test_a_client_that_leaves_ends_its_spans() -> None:
    with grpc_collector() as collected:
        tracing = tracing_to(collected)
        async with serving(tracing=tracing, delay_s=0.05) as server:
            body = hello("word " * 200, stream=True)
            async with server.http.stream("POST", CHAT, json=body, headers=SENT) as response:
                await anext(response.aiter_bytes())
            async with asyncio.timeout(10):
                while server.engine.running:  # noqa: ASYNC110 a counter without an event
                    await asyncio.sleep(0.01)
        await tracing.close()
        spans = collected.trace(PARENT, f"POST {CHAT}")
    assert spans[f"POST {CHAT} > engine"].attributes["packhorse.outcome"] == "cancelled"


def test_a_collector_that_is_down_costs_spans_only(tmp_path: Path) -> None:
    endpoint = {"PACKHORSE_TRACING__ENDPOINT": "http://127.0.0.1:9"}
    with running_server(tmp_path, "--engine", "echo", environment=endpoint) as server:
        for _ in range(5):
            assert httpx.post(server.url + CHAT, json=hello()).status_code == 200
        assert "Traces go to http://127.0.0.1:9" in server.log()
        assert server.stop(timeout_s=20) == 0
