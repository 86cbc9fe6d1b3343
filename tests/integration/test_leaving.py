"""Clients that leave, over both protocols, before and after the first bytes of an answer: the
engine stops, and nothing that the request had is left.

What leaving means to who shares an answer, to spans and to queues is tested beside those.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.integration.grpc_serving import Twins, chat, text, twins
from tests.integration.serving import nothing_left, until
from tests.protocol_parity import as_message, method

LONG = "word " * 500
PROMPTS = [LONG, "word " * 400, "word " * 300]
# What is asked, and whether the client leaves before any of it or after the first bytes.
CASES: dict[str, tuple[tuple[str, dict[str, Any]], bool]] = {
    "a whole answer": (chat(LONG), False),
    "a stream before it begins": (chat(LONG, stream=True), False),
    "a stream": (chat(LONG, stream=True), True),
    "whole answers to several prompts": (text(PROMPTS), False),
    "a stream of several prompts": (text(PROMPTS, stream=True), True),
}


async def leave_http(
    both: Twins, asked: tuple[str, dict[str, Any]], prompts: int, read: bool
) -> None:
    path, body = asked
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(*both.served.address)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await until(lambda: both.served.engine.running == prompts)
    if read:
        await reader.readuntil(b"data: ")
    writer.close()


async def leave_grpc(
    both: Twins, asked: tuple[str, dict[str, Any]], prompts: int, read: bool
) -> None:
    name, message = as_message(*asked)
    call = method(both.channel, name)(message)
    await until(lambda: both.served.engine.running == prompts)
    if read:
        await call.read()
    call.cancel()


@pytest.mark.parametrize("leave", [leave_http, leave_grpc])
@pytest.mark.parametrize("case", CASES)
async def test_a_client_that_leaves_gives_everything_back(case: str, leave: Any) -> None:
    asked, read = CASES[case]
    prompts = len(PROMPTS) if asked[0] == text()[0] else 1
    # Where the client reads, the first word comes soon and the last after 15 s; else none comes.
    async with twins(delay_s=0.05 if read else 600) as both:
        await leave(both, asked, prompts, read)
        await until(nothing_left(both.served))
        assert both.served.engine.aborted == prompts
        counted = both.served.pipeline.models.first.metrics.requests.labels("cancelled")
        assert counted._value.get() == prompts
        assert await both.served.pipeline.drain(10)
