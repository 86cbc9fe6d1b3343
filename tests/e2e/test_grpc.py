"""What goes wrong, on the real engine and over both protocols: one table drives both."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.client import TEXT, events, wait_for
from tests.conftest import DEMO, Server, running_server
from tests.e2e.test_caching import end_engine, metric_sum
from tests.protocol_parity import (
    Failed,
    as_message,
    failed_in_grpc,
    method,
    said_in_json,
    said_in_messages,
)

SETTINGS = """
admission: {max_in_engine: 6}
supervisor: {backoff_s: 0}
rpc: {port: 0}
service: {drain_timeout_s: 60}
"""
LONG = {"model": "demo", "prompt": "The", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
SHORT = {**LONG, "max_tokens": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("grpc")
    (folder / "serve.yaml").write_text(SETTINGS)
    arguments = ("--served-model-name", "demo", "--config", str(folder / "serve.yaml"))
    with running_server(folder, str(DEMO / "model"), *arguments) as server:
        yield server


@dataclass
class Begun:
    """A stream that has given its first piece. `rest` reads it to its end; `leave` ends it."""

    rest: Callable[[], Any]
    leave: Callable[[], None]


class OverHttp:
    def __init__(self, server: Server) -> None:
        self.http = httpx.Client(base_url=server.url, timeout=120)
        self.close = self.http.close

    def whole(self, body: dict[str, Any]) -> Any:
        response = self.http.post(TEXT, json=body)
        if response.status_code != 200:
            return self._failed(response.json()["error"], response)
        return said_in_json([response.json()])

    def begin(self, body: dict[str, Any]) -> Begun:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        sending = self.http.stream("POST", TEXT, json={**body, **options})
        response = sending.__enter__()
        assert response.status_code == 200
        lines = response.iter_lines()
        seen = [next(lines)]

        def rest() -> Any:
            seen.extend(lines)
            sending.__exit__(None, None, None)
            content = "\n".join(seen) + "\n"
            found = events(httpx.Response(200, headers=response.headers, text=content))
            last = found[-1]
            return self._failed(last["error"]) if "error" in last else said_in_json(found)

        return Begun(rest, lambda: sending.__exit__(None, None, None))

    def _failed(self, error: dict[str, Any], response: httpx.Response | None = None) -> Failed:
        after = response.headers.get("retry-after") if response is not None else None
        retry_s = None if after is None else float(after)
        return Failed("", error["kind"], error["message"], error["param"], retry_s)


class OverGrpc:
    def __init__(self, server: Server) -> None:
        address = server.log().split("gRPC at ")[1].split()[0]
        self.channel = grpc.insecure_channel(address)
        self.close = self.channel.close

    def whole(self, body: dict[str, Any]) -> Any:
        name, message = as_message(TEXT, body)
        try:
            return said_in_messages([method(self.channel, name)(message, timeout=120)])
        except grpc.RpcError as error:
            return failed_in_grpc(error)

    def begin(self, body: dict[str, Any]) -> Begun:
        name, message = as_message(TEXT, {**body, "stream": True})
        call = method(self.channel, name)(message, timeout=120)
        seen = [next(call), next(call)]

        def rest() -> Any:
            try:
                seen.extend(call)
            except grpc.RpcError as error:
                return failed_in_grpc(error)
            return said_in_messages(seen)

        return Begun(rest, call.cancel)


@pytest.fixture(params=[OverHttp, OverGrpc], ids=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    with contextlib.closing(request.param(server)) as client:
        yield client


@pytest.fixture
def both(server: Server) -> Iterator[tuple[OverHttp, OverGrpc]]:
    with (
        contextlib.closing(OverHttp(server)) as http,
        contextlib.closing(OverGrpc(server)) as rpc,
    ):
        yield http, rpc


@dataclass
class Background:
    """A whole answer that is waited for elsewhere."""

    found: list[Any] = field(default_factory=list)

    def start(self, client: Any, body: dict[str, Any]) -> threading.Thread:
        thread = threading.Thread(target=lambda: self.found.append(client.whole(body)))
        thread.start()
        return thread


def running(server: Server) -> float:
    """How many requests the engine says it has."""
    with httpx.Client(base_url=server.url) as http:
        return metric_sum(http, "vllm:num_requests_running")


def test_both_say_the_same(both: tuple[OverHttp, OverGrpc]) -> None:
    http, rpc = both
    assert http.whole(SHORT) == rpc.whole(SHORT)


def test_a_client_that_leaves(client: Any, server: Server) -> None:
    begun = client.begin(LONG)
    wait_for(lambda: running(server) == 1)
    begun.leave()
    wait_for(lambda: running(server) == 0)


def test_a_deadline(client: Any, server: Server) -> None:
    late = client.whole({**LONG, "timeout_s": 0.3})
    assert (late.kind, late.message[:33]) == ("deadline", "The request took longer than its ")
    wait_for(lambda: running(server) == 0)


def test_a_calls_own_deadline(server: Server, both: tuple[OverHttp, OverGrpc]) -> None:
    name, message = as_message(TEXT, LONG)
    with pytest.raises(grpc.RpcError) as caught:
        method(both[1].channel, name)(message, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: running(server) == 0)


def test_overload(client: Any, server: Server) -> None:
    begun = [client.begin(LONG) for _ in range(6)]
    refused = client.whole(SHORT)
    assert refused.kind == "overloaded"
    assert refused.retry_s >= 1
    for stream in begun:
        stream.leave()
    wait_for(lambda: running(server) == 0)
    assert client.whole(SHORT).choices[0].finish_reason == "length"


def test_an_engine_that_dies(client: Any, server: Server, both: tuple[OverHttp, OverGrpc]) -> None:
    """What had begun ends with an error, what had not is answered by the next engine."""
    stub = health_pb2_grpc.HealthStub(both[1].channel)
    watching = stub.Watch(health_pb2.HealthCheckRequest(service="packhorse.v1.Inference"))
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    begun, whole = client.begin(LONG), Background()
    waiting = whole.start(client, {**LONG, "max_tokens": 400})
    wait_for(lambda: running(server) == 2)
    end_engine(server)
    ended = begun.rest()
    assert (ended.kind, ended.message) == (
        "unavailable",
        "The engine stopped while it answered; send the request again.",
    )
    assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    waiting.join(120)
    assert whole.found[0].usage[1] == 400
    watching.cancel()


def test_a_drain(server: Server, both: tuple[OverHttp, OverGrpc]) -> None:
    """The last test: both protocols end what has begun, and take nothing new."""
    stub = health_pb2_grpc.HealthStub(both[1].channel)
    watching = stub.Watch(health_pb2.HealthCheckRequest(service=""))
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    begun = [client.begin({**LONG, "max_tokens": 600}) for client in both]
    server.process.terminate()
    assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
    for client in both:
        assert client.whole(SHORT).kind == "unavailable"
    for stream in begun:
        assert stream.rest().usage[1] == 600
    assert server.process.wait(60) == 0
