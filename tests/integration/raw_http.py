"""HTTP as bytes: requests that no client library would send, or not like that."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.client import CHAT
from tests.integration.serving import Served

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[..., Awaitable[Ends]]
WAIT_S = 20


@asynccontextmanager
async def connecting() -> AsyncIterator[Connect]:
    """Opens connections that are closed at the end."""
    opened: list[asyncio.StreamWriter] = []

    async def made(server: Served, sent: bytes = b"") -> Ends:
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(sent)
        opened.append(writer)
        return reader, writer

    yield made
    for writer in opened:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def rest_of(ends: Ends) -> bytes:
    """What still comes until the server closes."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(WAIT_S):
            while part := await ends[0].read(2**16):
                said += part
    return said


async def answer_of(ends: Ends) -> tuple[int, dict[str, str], bytes]:
    """One whole answer: status, headers, body."""
    async with asyncio.timeout(WAIT_S):
        head = (await ends[0].readuntil(b"\r\n\r\n")).decode()
        lines = head.split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        body = await ends[0].readexactly(int(headers.get("content-length", 0)))
    return int(lines[0].split()[1]), headers, body


def post(body: dict[str, Any], *headers: str, path: str = CHAT) -> bytes:
    content = json.dumps(body).encode()
    lines = (
        f"POST {path} HTTP/1.1",
        "host: x",
        f"content-length: {len(content)}",
        *headers,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


GET_LIVE = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
HALF = b"content-length: 1000000\r\n\r\n{"


def connections(server: Served) -> int:
    return server.listeners._connections.count
