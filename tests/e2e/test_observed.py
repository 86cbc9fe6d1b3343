"""What an operator sees of a server with everything switched on: one call traced from end to end,
and a minute of mixed load with the death of an engine, scraped by a real Prometheus.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.client import CHAT, request_lines, wait_for
from tests.collector import Collected, http_collector
from tests.conftest import Server, running_server
from tests.deploy.scraping import needs_prometheus, running_prometheus
from tests.e2e import mixed
from tests.e2e.adapted import ZENTROL, arguments, make_folder
from tests.protocol_parity import as_message, metadata, method

PHASE_S = 6


@pytest.fixture(scope="module")
def collected() -> Iterator[Collected]:
    with http_collector() as found:
        yield found


@pytest.fixture(scope="module")
def server(
    int8_folder: Path, collected: Collected, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("observed")
    make_folder(folder)
    tracing = {"endpoint": collected.url, "protocol": "http/protobuf"}
    options = arguments(int8_folder, folder, tracing=tracing, rpc={"port": 0})
    often = {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # spans are sent so often, in ms
    with running_server(folder, *options, cache=True, environment=often) as server:
        yield server


def traceparent(number: int) -> str:
    return f"00-{number:032x}-00f067aa0ba902b7-01"


# The picture of docs/observability.md.
STEPS = {
    "route",
    "render",
    "cache",
    "admission",
    "engine",
    "engine > engine.queue",
    "engine > engine.prefill",
    "engine > engine.decode",
}


def in_order(spans: dict[str, Any], root: str) -> bool:
    """Each step begins where the one before it ends, or later; the engine's own lie within it."""
    names = ("route", "render", "cache", "admission", "engine")
    steps = [spans[f"{root} > {name}"] for name in names]
    inner = [spans[f"{root} > engine > engine.{name}"] for name in ("queue", "prefill", "decode")]
    slack_ns = 5_000_000  # the engine's clock is read in another process
    follows = [
        before.end_ns <= after.start_ns + slack_ns
        for row in (steps, inner)
        for before, after in itertools.pairwise(row)
    ]
    engine, whole = steps[-1], spans[root]
    within = [engine.start_ns - slack_ns <= step.start_ns <= step.end_ns for step in inner]
    return all(follows) and all(within) and engine.end_ns <= whole.end_ns + slack_ns


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_over_http(server: Server, collected: Collected, stream: bool) -> None:
    """The same id in the answer's header, the log and every span; the prompt in none of them."""
    asked, request_id = 100 + stream, f"traced-http-{stream}"
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": ZENTROL}],
        "temperature": 0,
        "max_tokens": 16 + stream,
        "stream": stream,
    }
    headers = {"traceparent": traceparent(asked), "x-request-id": request_id}
    response = httpx.post(server.url + CHAT, json=body, headers=headers, timeout=120)
    assert response.status_code == 200
    assert response.headers["x-request-id"] == request_id
    spans = collected.trace(f"{asked:032x}", f"POST {CHAT}")
    root = spans[f"POST {CHAT}"]
    assert response.headers["traceparent"] == f"00-{asked:032x}-{root.span_id}-01"
    assert {path.removeprefix(f"POST {CHAT} > ") for path in spans} - {f"POST {CHAT}"} == STEPS
    assert in_order(spans, f"POST {CHAT}")
    own = [span for span in spans.values() if not span.name.startswith("engine.")]
    assert {span.attributes["packhorse.request_id"] for span in own} == {request_id}
    engine = spans[f"POST {CHAT} > engine"].attributes
    assert engine["gen_ai.response.model"] == "clinic"
    assert engine["gen_ai.usage.output_tokens"] > 3
    assert spans[f"POST {CHAT} > cache"].attributes["packhorse.cache"] == "miss"
    (line,) = [x for x in request_lines(server.log()) if x["request_id"] == request_id]
    assert line["trace_id"] == f"{asked:032x}"
    assert line["completion_tokens"] == engine["gen_ai.usage.output_tokens"]
    assert 0 <= line["queue_s"] < line["first_token_s"] <= line["total_s"]
    assert "Zentrol" not in server.log()
    assert "Zentrol" not in str(spans)


def test_a_call_over_grpc(server: Server, collected: Collected) -> None:
    root = "packhorse.v1.Inference/Chat"
    messages = [{"role": "user", "content": "What is the dose of Zentrol?"}]
    name, message = as_message(CHAT, {"model": "clinic", "messages": messages, "temperature": 0})
    sent = metadata({"traceparent": traceparent(200), "x-request-id": "traced-grpc"})
    with grpc.insecure_channel(mixed.rpc_address_of(server)) as channel:
        _, call = method(channel, name).with_call(message, metadata=sent, timeout=120)
        trailers = dict(call.trailing_metadata())
    spans = collected.trace(f"{200:032x}", root)
    assert trailers["x-request-id"] == "traced-grpc"
    assert trailers["traceparent"] == f"00-{200:032x}-{spans[root].span_id}-01"
    assert {path.removeprefix(f"{root} > ") for path in spans} - {root} == STEPS
    assert in_order(spans, root)
    assert spans[root].attributes["packhorse.request_id"] == "traced-grpc"
    (line,) = [x for x in request_lines(server.log()) if x["request_id"] == "traced-grpc"]
    assert line["trace_id"] == f"{200:032x}"


def test_a_hit_never_saw_the_engine(server: Server, collected: Collected) -> None:
    body = {
        "model": "clinic",
        "messages": [{"role": "user", "content": ZENTROL}],
        "temperature": 0,
        "max_tokens": 20,
    }
    for number in (300, 301):
        headers = {"traceparent": traceparent(number)}
        httpx.post(server.url + CHAT, json=body, headers=headers, timeout=120)
    first = collected.trace(f"{300:032x}", f"POST {CHAT}")
    second = collected.trace(f"{301:032x}", f"POST {CHAT}")
    assert f"POST {CHAT} > engine" in first
    assert {span.name for span in second.values()} == {f"POST {CHAT}", "route", "cache"}


@needs_prometheus
async def test_half_a_minute_of_everything(server: Server, tmp_path: Path) -> None:
    """What the client, ours and the engine's metrics counted is the same, but for the death; no
    counter goes backwards; and no series comes or goes.
    """
    target = server.url.removeprefix("http://")
    with running_prometheus(tmp_path, target) as prometheus:
        found = await mixed.run(server, mixed.rpc_address_of(server), prometheus, PHASE_S)
    assert found.problems == []
    assert found.requests["ok"] > 60
    assert found.scrapes > PHASE_S
    wait_for(lambda: httpx.get(server.url + "/health/ready").status_code == 200)
