"""A server that goes: clients leave it at once, and what they have asked is answered."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from packhorse.serve.rpc.pb import inference_pb2
from tests.client import CHAT, hello, wait_for
from tests.conftest import Server, running_server
from tests.integration.raw_http import (
    GET_LIVE,
    WAIT_S,
    Connect,
    answer_of,
    connections,
    post,
    rest_of,
)
from tests.integration.serving import Held, serving, until


async def test_every_answer_of_a_drain_closes_its_connection(connect: Connect) -> None:
    engine = Held()
    async with serving(engine=engine) as server:
        idle = await connect(server, GET_LIVE)
        status, headers, _ = await answer_of(idle)
        assert (status, "connection" in headers) == (200, False)
        fresh, half = await connect(server), await connect(server, post(hello())[:30])
        whole = await connect(server, post(hello()))
        stream = await connect(server, post(hello(stream=True)))
        await until(lambda: engine.held == 2 and connections(server) == 5)
        server.pipeline.stop_admitting()
        server.listeners.drain()
        idle[1].write(GET_LIVE)
        status, headers, _ = await answer_of(idle)
        assert (status, headers["connection"]) == (200, "close")
        assert await rest_of(idle) == b""
        half[1].write(post(hello())[30:])
        status, headers, _ = await answer_of(half)
        assert (status, headers["connection"]) == (503, "close")
        assert await rest_of(half) == b""
        fresh[1].write(GET_LIVE)
        status, headers, _ = await answer_of(fresh)
        assert (status, headers["connection"]) == (200, "close")
        late = await server.http.post(CHAT, json=hello())
        assert (late.status_code, late.headers["connection"]) == (503, "close")
        engine.go.set()
        status, headers, _ = await answer_of(whole)
        assert (status, headers["connection"]) == (200, "close")
        said = await rest_of(stream)
        assert b"connection: close" in said
        assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_stream_that_has_begun_ends_its_connection_while_draining(connect: Connect) -> None:
    async with serving(delay_s=0.02) as server:
        ends = await connect(server, post(hello("word " * 20, stream=True)))
        async with asyncio.timeout(WAIT_S):
            await ends[0].readuntil(b"data: ")
        server.pipeline.stop_admitting()
        server.listeners.drain()
        assert (await rest_of(ends)).endswith(b"0\r\n\r\n")


def grpc_address(server: Server) -> str:
    return server.log().split("gRPC at ")[1].split()[0]


def test_sigterm_sends_clients_away_and_answers_what_they_have_asked(tmp_path: Path) -> None:
    """The whole server, on both protocols."""
    settings = {
        "PACKHORSE_RPC__PORT": "0",
        "PACKHORSE_ENGINE__ECHO_DELAY_S": "0.05",
        "PACKHORSE_SERVICE__DRAIN_TIMEOUT_S": "60",
    }
    with (
        running_server(tmp_path, "--engine", "echo", environment=settings) as server,
        httpx.Client(base_url=server.url, timeout=30) as pooled,
        grpc.insecure_channel(grpc_address(server)) as channel,
    ):
        chat = channel.unary_stream(
            "/packhorse.v1.Inference/ChatStream",
            request_serializer=inference_pb2.ChatRequest.SerializeToString,
            response_deserializer=inference_pb2.ChatChunk.FromString,
        )
        assert pooled.get("/health/ready").status_code == 200
        asked = hello("word " * 60, stream=True)
        message = inference_pb2.ChatRequest(model="echo")
        message.messages.add(role="user", content="word " * 60)
        with httpx.stream("POST", server.url + CHAT, json=asked, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            rpc_stream = chat(message)
            next(rpc_stream)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            # Health is looked at four times a second: it may be behind what HTTP says.
            assert any(told.status == health_pb2.HealthCheckResponse.SERVING for told in watch)
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            wait_for(lambda: "Draining" in server.log())
            late = pooled.post("/v1/chat/completions", json=hello())
            assert (late.status_code, late.headers["connection"]) == (503, "close")
            live = httpx.get(server.url + "/health/live")
            assert (live.status_code, live.headers["connection"]) == (200, "close")
            with (
                grpc.insecure_channel(grpc_address(server)) as fresh,
                pytest.raises(grpc.RpcError) as caught,
            ):
                health_pb2_grpc.HealthStub(fresh).Check(health_pb2.HealthCheckRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert sum(1 for _ in rpc_stream) > 50
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.process.wait(30) == 0
