"""gRPC from clients that send much, or too slowly, or stay for too long; and a server that goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from packhorse.serve.limits import body_memory
from packhorse.serve.rpc import public as open_calls
from packhorse.serve.rpc import server as rpc_server
from packhorse.serve.rpc.lazy_messages import OPEN_READS
from tests.integration.grpc_serving import Twins, chat, twins
from tests.integration.serving import Held, nothing_left, until, write_keys
from tests.integration.test_grpc_abuse import hello_and_ask
from tests.protocol_parity import as_message, method, said_in_messages

CHAT = "/packhorse.v1.Inference/Chat"
CHECK = "/grpc.health.v1.Health/Check"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def unsent(both: Twins, path: str = CHAT, key: str = "") -> Any:
    """A call whose message never comes. To the wire, unary calls are streams of one message."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    metadata = (("authorization", f"Bearer key-{key}"),) if key else ()
    return both.channel.stream_unary(path)(nothing(), metadata=metadata)


async def code_of(call: Any) -> str:
    async with asyncio.timeout(20):
        code = await call.code()
    return str(code.name)


async def peer_reads(both: Twins, sent: bytes) -> tuple[Any, asyncio.StreamWriter]:
    host, _, port = both.rpc.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    return reader, writer


@pytest.mark.parametrize("name", ["Chat", "ChatStream", "ListModels"])
async def test_strangers_are_refused_before_their_message_is_read(
    name: str, tmp_path: Path
) -> None:
    async with twins(keys=write_keys(tmp_path / "keys.yaml", good={})) as both:
        path = f"/packhorse.v1.Inference/{name}"
        assert await code_of(unsent(both, path)) == "UNAUTHENTICATED"
        assert await code_of(unsent(both, path, "wrong")) == "UNAUTHENTICATED"
        operators = unsent(both, "/packhorse.v1.Admin/FlushCache", "good")
        assert await code_of(operators) == "PERMISSION_DENIED"
        assert both.served.pipeline.admission.bodies.held == 0


async def test_above_the_limit_calls_are_refused_before_their_message_is_read() -> None:
    async with twins(limits={"max_in_flight": 2}) as both:
        held = [unsent(both) for _ in range(2)]
        await until(lambda: both.served.pipeline.admission.in_flight == 2)
        assert await code_of(unsent(both)) == "RESOURCE_EXHAUSTED"
        for call in held:
            call.cancel()
        await until(nothing_left(both.served))
        assert (await both.ask(*chat())).choices[0].text == "one two three"


async def test_a_message_that_does_not_come_in_time() -> None:
    async with twins(rpc={"stalled_client_timeout_s": 0.2}) as both:
        call = unsent(both)
        assert await code_of(call) == "DEADLINE_EXCEEDED"
        assert "0.2 s" in await call.details()
        await until(nothing_left(both.served))
        assert not both.served.pipeline.admission.bodies.held


async def test_a_call_without_a_message() -> None:
    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    async with twins() as both:
        for path in (CHAT, CHECK):
            call = both.channel.stream_unary(path)(nothing())
            assert await code_of(call) == "INVALID_ARGUMENT"
            assert "no message" in await call.details()


async def test_one_keys_messages_leave_room_for_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_memory, "MAX_WAIT_S", 0.2)
    keys = write_keys(tmp_path / "keys.yaml", greedy={}, good={})
    # Room for eight messages of a little above 1 MiB.
    limits = {"max_bodies_bytes": 9 * 2**20}
    async with twins(keys=keys, limits=limits, rpc={"max_message_bytes": 1024}) as both:
        held = [unsent(both, key="greedy") for _ in range(4)]
        await until(lambda: both.served.pipeline.admission.bodies.held > 4 * 2**20)
        refused = unsent(both, key="greedy")
        assert await code_of(refused) == "RESOURCE_EXHAUSTED"
        assert str(9 * 2**20) in await refused.details()
        asked = (both.ask(*chat(), authorization="Bearer key-good") for _ in range(20))
        said = await asyncio.gather(*asked)
        assert [answer.choices[0].text for answer in said] == ["one two three"] * 20
        waits = asyncio.ensure_future(both.ask(*chat(), authorization="Bearer key-greedy"))
        held[0].cancel()
        assert (await waits).choices[0].text == "one two three"
        for call in held:
            call.cancel()
        await until(nothing_left(both.served))
        await until(lambda: not both.served.pipeline.admission.bodies.held)


async def test_health_and_reflection_answer_while_others_send_nothing() -> None:
    async with twins() as both:
        held = [unsent(both, path) for path in (CHECK, REFLECT) for _ in range(30)]
        health = health_pb2_grpc.HealthStub(both.channel)
        for name in ("", "packhorse.v1.Inference", "packhorse.v1.Admin"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="unknown"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        reflection = reflection_pb2_grpc.ServerReflectionStub(both.channel)
        (listed,) = [answer async for answer in reflection.ServerReflectionInfo(iter([asked]))]
        names = {service.name for service in listed.list_services_response.service}
        assert {"packhorse.v1.Inference", "grpc.health.v1.Health"} <= names
        # The oldest had to make room for them.
        await until(lambda: sum(call.done() for call in held) >= len(held) - OPEN_READS)
        assert {await code_of(call) for call in held if call.done()} == {"DEADLINE_EXCEEDED"}
        for call in held:
            call.cancel()
        for path in (CHECK, REFLECT):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await both.channel.unary_unary(path)(b"\xff\xff")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_watches_leave_places_for_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_calls, "MAX_CALLS", 5)
    async with twins(rpc={"max_calls": 8}) as both:
        health = health_pb2_grpc.HealthStub(both.channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(5)]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        extra = health.Watch(health_pb2.HealthCheckRequest())
        assert await code_of(extra) == "RESOURCE_EXHAUSTED"
        assert (await both.ask(*chat())).choices[0].text == "one two three"
        # What a probe asks is answered, or strangers' watches would have the server restarted.
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        for watch in watches:
            watch.cancel()


async def test_a_watch_that_is_not_read_keeps_nobody_from_hearing() -> None:
    async with twins() as both:
        silent = hello_and_ask(
            "/grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest(), window=0
        )
        _, writer = await peer_reads(both, silent)
        await until(lambda: both.rpc._public._calls == 1)
        health = health_pb2_grpc.HealthStub(both.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        both.served.pipeline.stop_admitting()
        async with asyncio.timeout(20):
            assert (await watch.read()).status == NOT_SERVING
            await both.rpc.stop(0)
        writer.close()


async def test_more_connections_than_the_limit_are_closed() -> None:
    async with twins(rpc={"max_connections": 2}) as both:
        assert (await both.ask(*chat())).choices
        idle, extra = [await peer_reads(both, b"") for _ in range(2)]
        async with asyncio.timeout(20):
            assert await idle[0].read(9)
            with contextlib.suppress(ConnectionResetError):
                assert await extra[0].read(9) == b""
        assert (await both.ask(*chat())).choices
        for _, writer in (idle, extra):
            writer.close()


async def rest_of(call: Any) -> list[Any]:
    chunks = []
    while (chunk := await call.read()) is not grpc.aio.EOF:
        chunks.append(chunk)
    return chunks


def client_ports(both: Twins) -> set[int]:
    port = int(both.rpc.address.rpartition(":")[2])
    return {
        found.laddr.port
        for found in psutil.Process().net_connections("tcp")
        if found.raddr and found.raddr.port == port and found.status == "ESTABLISHED"
    }


async def test_old_connections_are_replaced_and_no_call_fails() -> None:
    async with twins(delay_s=0.005, rpc={"max_connection_age_s": 0.3}) as both:
        name, message = as_message(*chat("word " * 400, stream=True))
        long = method(both.channel, name)(message)
        first = await long.read()
        ports = client_ports(both)
        began_on = set(ports)
        while len(ports) < 3:
            assert (await both.ask(*chat())).choices[0].text == "one two three"
            ports |= client_ports(both)
        said = said_in_messages([first, *await rest_of(long)])
        assert said.choices[0].text.split() == ["word"] * 400
        await until(lambda: not began_on & client_ports(both))


async def test_a_drain_tells_clients_to_leave_and_lets_calls_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Held()
    told = asyncio.Event()
    slept = asyncio.sleep

    async def until_told(seconds: float) -> None:
        if seconds == rpc_server.TOLD_FIRST_S:
            await told.wait()
        await slept(seconds)

    monkeypatch.setattr(rpc_server.asyncio, "sleep", until_told)
    async with twins(engine=engine) as both:
        name, message = as_message(*chat(stream=True))
        stream = method(both.channel, name)(message)
        await until(lambda: engine.held == 1)
        watch = health_pb2_grpc.HealthStub(both.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        both.served.pipeline.stop_admitting()
        draining = asyncio.create_task(both.rpc.drain())
        # Health first, and while it is told calls are refused by us, with all that we say.
        assert (await watch.read()).status == NOT_SERVING
        refused = await both.ask(*chat())
        assert (refused.code, refused.kind) == ("UNAVAILABLE", "unavailable")
        told.set()
        await draining
        # Then the connection goes, and there is no other.
        await until(lambda: both.channel.get_state() is not grpc.ChannelConnectivity.READY)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(both.channel, "Chat")(as_message(*chat())[1])
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        engine.go.set()
        assert said_in_messages([c async for c in stream]).choices[0].text == "one two three"
        async with asyncio.timeout(20):
            await both.rpc.stop(0.1)
