"""gRPC from clients that send junk, leave, or read nothing."""

from __future__ import annotations

import asyncio
import gc
import random
import struct
from typing import Any

import grpc
import psutil
import pytest

from tests.integration.grpc_serving import chat, text, twins
from tests.integration.serving import until
from tests.protocol_parity import (
    as_message,
    failed_in_grpc,
    method,
)


async def test_messages_that_are_too_large_and_that_are_none() -> None:
    async with twins(rpc={"max_message_bytes": 2000}) as both:
        large = await both.ask(*chat("x" * 3000))
        assert (large.code, large.kind) == ("INVALID_ARGUMENT", "too_large")
        assert "2000" in large.message
        raw = both.channel.unary_unary("/packhorse.v1.Inference/Chat")
        for junk in (b"\xff\xff", b"\x0a\xff", b"\x0a\x01\xff"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(junk)
            assert failed_in_grpc(caught.value).kind == "invalid"
        unknown = both.channel.unary_unary("/packhorse.v1.Inference/Sing")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unknown(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_abuse_leaves_nothing_behind() -> None:
    """500 bad messages, 200 abandoned streams: no INTERNAL, no task, no request left."""
    rng = random.Random(5)
    good = as_message(*chat())[1].SerializeToString()
    async with twins(delay_s=0.01, rpc={"max_message_bytes": 100_000}) as both:
        raw = both.channel.unary_unary("/packhorse.v1.Inference/Chat")
        await raw(good)
        tasks, memory = len(asyncio.all_tasks()), psutil.Process().memory_info().rss

        async def spoiled() -> str:
            junk = bytearray(good * rng.choice((1, 1, 3)))
            for _ in range(rng.randint(1, 4)):
                junk[rng.randrange(len(junk))] = rng.randrange(256)
            if rng.random() < 0.1:
                junk = bytearray(rng.randbytes(150_000))
            try:
                await raw(bytes(junk))
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        codes = set()
        for _ in range(25):
            codes |= set(await asyncio.gather(*(spoiled() for _ in range(20))))
        assert codes <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
        assert "INVALID_ARGUMENT" in codes

        async def abandon() -> None:
            call = method(both.channel, "ChatStream")(as_message(*chat("a b c d e f g"))[1])
            if rng.random() < 0.7:
                await call.read()
            call.cancel()

        for _ in range(10):
            await asyncio.gather(*(abandon() for _ in range(20)))
        await until(lambda: both.served.engine.running == 0)
        assert await both.served.pipeline.drain(10)
        assert both.served.pipeline.admission.in_flight == 0
        gc.collect()
        await until(lambda: len(asyncio.all_tasks()) <= tasks + 2)
        assert psutil.Process().memory_info().rss < memory + 60 * 2**20


async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """A bare socket that says hello in HTTP/2, asks, and never reads nor opens its window."""
    async with twins(rpc={"stalled_client_timeout_s": 0.4, "max_message_bytes": 2**22}) as both:
        host, _, port = both.rpc.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        message = as_message(*text("word " * 1500, max_tokens=400, n=64, temperature=1.0))[1]
        writer.write(hello_and_ask("/packhorse.v1.Inference/CompleteStream", message))
        await writer.drain()
        await until(lambda: both.served.pipeline._in_flight == 1)
        await until(lambda: both.served.pipeline._in_flight == 0, 20)
        await until(lambda: both.served.engine.running == 0)
        writer.close()
        del reader


def hello_and_ask(path: str, message: Any, window: int = 100) -> bytes:
    """The bytes of an HTTP/2 connection with one gRPC request and a window of nearly nothing."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
        )

    def literal(name: str, value: str) -> bytes:
        return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

    headers = b"".join(
        literal(*pair)
        for pair in (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "x"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )
    )
    content = message.SerializeToString()
    settings = struct.pack(">HI", 4, window)  # SETTINGS_INITIAL_WINDOW_SIZE
    data = b"\x00" + struct.pack(">I", len(content)) + content
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(4, 0, 0, settings)
        + frame(1, 4, 1, headers)
        + frame(0, 1, 1, data)
    )
