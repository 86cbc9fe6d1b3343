"""The floods of bench/floods.py: clients without manners, in a process of their own.

    python bench/flood_clients.py KIND HTTP_PORT GRPC_PORT NUMBER

Runs until its stdin is closed; says `flooding` once all that it opens at first is open. What the
server closes is opened again, a second later.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable

HOST = "127.0.0.1"
AGAIN_S = 1.0
BODY_BYTES = 4 * 2**20 - 4096  # within the default limit of both protocols
PIECE = b"x" * 65536
OPENED_AT_ONCE = 100
STREAMS = 16  # calls of one gRPC connection
GREEDY = "key-greedy"

seen: Counter[str] = Counter()


def head(key: str = "", *more: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", "content-type: application/json"]
    lines += [f"authorization: Bearer {key}"] * bool(key) + list(more)
    return "\r\n".join(lines).encode() + b"\r\n"


class Raw:
    """One connection and what is sent on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes, *, pieces: int = 1) -> None:
        for _ in range(pieces):
            self._writer.write(data)
            await self._writer.drain()

    async def read_all(self) -> None:
        while data := await self._reader.read(2**16):
            for status in (b"401", b"408", b"429", b"431", b"503"):
                if b"HTTP/1.1 " + status in data:
                    seen[status.decode()] += 1


async def idle(raw: Raw) -> None:
    await raw.read_all()


async def slow_headers(raw: Raw) -> None:
    await raw.send(head())
    while True:
        await asyncio.sleep(1)
        await raw.send(b"a: b\r\n")


async def long_headers(raw: Raw) -> None:
    await raw.send(head() + b"a: ")
    await raw.send(PIECE, pieces=64)
    await raw.read_all()


async def half_bodies(raw: Raw, key: str = "") -> None:
    await raw.send(head(key, f"content-length: {BODY_BYTES}") + b"\r\n")
    await raw.send(PIECE, pieces=BODY_BYTES // len(PIECE) - 1)
    while True:
        await asyncio.sleep(1)
        await raw.send(b"x")


async def half_bodies_of_a_key(raw: Raw) -> None:
    await half_bodies(raw, GREEDY)


async def trailers(raw: Raw) -> None:
    """One without an end, after a whole body; of a known key, whose request waits for it."""
    await raw.send(head(GREEDY, "transfer-encoding: chunked") + b"\r\n2\r\n{}\r\n0\r\na: ")
    await raw.send(PIECE, pieces=64)
    await raw.read_all()


async def pipelined(raw: Raw) -> None:
    """Requests without end, whose answers nobody reads."""
    await raw.send(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n" * 1000, pieces=50)
    await asyncio.Event().wait()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str) -> bytes:
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Half:
    """gRPC calls on one connection: messages of which all but the last byte is sent, as soon as the
    server's windows allow.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._windows = {0: 65535}
        self._first_window = 65535
        self._left: dict[int, int] = {}
        self._key = key

    async def run(self) -> None:
        pairs = [
            (":method", "POST"), (":scheme", "http"), (":path", "/packhorse.v1.Inference/Chat"),
            (":authority", "x"), ("te", "trailers"), ("content-type", "application/grpc"),
        ]  # fmt: skip
        pairs += [("authorization", f"Bearer {self._key}")] * bool(self._key)
        headers = b"".join(literal(*pair) for pair in pairs)
        self._writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
        for number in range(STREAMS):
            self._ask(2 * number + 1, headers)
        while True:
            start = await self._reader.readexactly(9)
            size = int.from_bytes(start[:3], "big")
            kind, flags, stream = struct.unpack(">BBI", start[3:])
            self._heard(kind, flags, stream, await self._reader.readexactly(size))
            self._send_more()
            await self._writer.drain()
            if not self._left:
                return

    def _ask(self, stream: int, headers: bytes) -> None:
        self._writer.write(frame(1, 4, stream, headers))
        self._windows[stream] = self._first_window
        self._left[stream] = BODY_BYTES - 1
        self._write(stream, b"\x00" + struct.pack(">I", BODY_BYTES))

    def _heard(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == 4 and not flags & 1:  # SETTINGS
            for name, value in struct.iter_unpack(">HI", payload):
                if name == 4:
                    for known in self._left:
                        self._windows[known] += value - self._first_window
                    self._first_window = value
            self._writer.write(frame(4, 1, 0, b""))
        elif kind == 8:  # WINDOW_UPDATE
            self._windows[stream] = self._windows.get(stream, 0) + int.from_bytes(payload, "big")
        elif kind == 6 and not flags & 1:  # PING
            self._writer.write(frame(6, 1, 0, payload))
        elif kind in (1, 3) and stream in self._left:  # trailers, or a reset
            seen["calls refused"] += 1
            del self._left[stream]

    def _send_more(self) -> None:
        for stream, left in list(self._left.items()):
            while left and (room := min(self._windows[0], self._windows[stream], 16384, left)) > 0:
                self._write(stream, PIECE[:room])
                left -= room
            self._left[stream] = left

    def _write(self, stream: int, data: bytes) -> None:
        self._windows[0] -= len(data)
        self._windows[stream] -= len(data)
        self._writer.write(frame(0, 0, stream, data))


Flood = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def over_http(what: Callable[[Raw], Awaitable[None]]) -> Flood:
    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await what(Raw(reader, writer))

    return run


def over_grpc(key: str) -> Flood:
    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Half(reader, writer, key).run()

    return run


# What each connection does, and whether it goes to gRPC's port.
FLOODS: dict[str, tuple[Flood, bool]] = {
    "idle": (over_http(idle), False),
    "slow_headers": (over_http(slow_headers), False),
    "long_headers": (over_http(long_headers), False),
    "half_bodies": (over_http(half_bodies), False),
    "half_bodies_of_a_key": (over_http(half_bodies_of_a_key), False),
    "trailers": (over_http(trailers), False),
    "pipelined": (over_http(pipelined), False),
    "grpc_idle": (over_http(idle), True),
    "grpc_half_messages": (over_grpc(""), True),
    "grpc_half_messages_of_a_key": (over_grpc(GREEDY), True),
}


async def flood(kind: str, http_port: int, grpc_port: int, number: int) -> None:
    what, is_grpc = FLOODS[kind]
    port = grpc_port if is_grpc else http_port
    turn = asyncio.Semaphore(OPENED_AT_ONCE)
    opened: list[asyncio.Event] = []

    async def one(is_open: asyncio.Event) -> None:
        while True:
            writer = None
            try:
                async with turn:
                    async with asyncio.timeout(20):
                        reader, writer = await asyncio.open_connection(HOST, port)
                is_open.set()
                await what(reader, writer)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                is_open.set()
            finally:
                if writer is not None:
                    writer.close()
            seen["ended by the server"] += 1
            await asyncio.sleep(AGAIN_S)

    tasks = []
    for _ in range(number):
        opened.append(asyncio.Event())
        tasks.append(asyncio.create_task(one(opened[-1])))
    for event in opened:
        await event.wait()
    print("flooding", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    with contextlib.suppress(Exception):
        await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps(dict(seen)), flush=True)


if __name__ == "__main__":
    asyncio.run(flood(sys.argv[1], *map(int, sys.argv[2:5])))
