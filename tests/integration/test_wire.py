"""HTTP/1.1 as some clients speak it: other protocols offered, halves closed, many requests at once,
1.0, bodies that wait to be asked for.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from tests.client import CHAT, hello
from tests.integration.raw_http import answer_of, connecting, post, rest_of
from tests.integration.serving import Held, Served, nothing_left, serving, until

OFFER = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
BODY = json.dumps(hello()).encode()


def chunked(*headers: str) -> bytes:
    lines = (f"POST {CHAT} HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", *headers, "", "")
    parts = [BODY[:10], BODY[10:]]
    encoded = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return "\r\n".join(lines).encode() + encoded + b"0\r\n\r\n"


def said(answer: tuple[int, dict[str, str], bytes]) -> str:
    status, _, body = answer
    assert status == 200, body
    text: str = json.loads(body)["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize("cut", [0, 1, 20, None, -5, -1])
@pytest.mark.parametrize(
    "request_bytes", [post(hello(), *OFFER), chunked(*OFFER)], ids=["length", "chunks"]
)
async def test_an_offer_to_upgrade_is_passed_over(request_bytes: bytes, cut: int | None) -> None:
    """However it is split; None: between headers and body. And the connection goes on."""
    if cut is None:
        cut = request_bytes.index(b"\r\n\r\n") + 4
    async with serving() as server, connecting() as connect:
        ends = await connect(server, request_bytes[:cut])
        await asyncio.sleep(0.05)
        ends[1].write(request_bytes[cut:])
        assert said(await answer_of(ends)) == "one two three"
        ends[1].write(post(hello("again")))
        assert said(await answer_of(ends)) == "again"
        ends[1].write(post(hello("and again"), *OFFER))
        assert said(await answer_of(ends)) == "and again"


async def test_offers_of_requests_that_come_together() -> None:
    async with serving() as server, connecting() as connect:
        together = [post(hello(text), *OFFER) for text in ("one", "two", "three")]
        ends = await connect(server, b"".join(together) + post(hello("four")))
        assert [said(await answer_of(ends)) for _ in range(4)] == ["one", "two", "three", "four"]


async def test_an_offer_keeps_what_else_connection_says() -> None:
    async with serving() as server, connecting() as connect:
        ends = await connect(server, post(hello(), "Connection: close, Upgrade", "Upgrade: h2c"))
        assert said(await answer_of(ends)) == "one two three"
        assert await rest_of(ends) == b""
        # What is no HTTP behind an offer is told.
        ends = await connect(server, post({}, *OFFER)[:-2] + b"\x00\x01 what\r\n\r\n")
        assert b"HTTP/1.1 400" in await rest_of(ends)


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
async def test_who_closes_a_half_gets_the_answer(fields: dict[str, Any]) -> None:
    async with serving(delay_s=0.1) as server, connecting() as connect:
        ends = await connect(server, post(hello(**fields)))
        ends[1].write_eof()
        answer = await rest_of(ends)
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
        assert b"three" in answer
        assert (b"data: [DONE]" in answer) == bool(fields)


@pytest.mark.parametrize("after", [1, 2, 3])
async def test_nor_does_it_matter_when_it_is_closed(after: int) -> None:
    """After some of the answer has come."""
    async with serving(delay_s=0.05) as server, connecting() as connect:
        ends = await connect(server, post(hello("a b c d e f", stream=True)))
        said = b""
        while said.count(b"data: ") < after:
            said += await ends[0].read(2**16)
        ends[1].write_eof()
        said += await rest_of(ends)
        assert b'"f"' in said.replace(b'" f"', b'"f"')
        assert b"data: [DONE]" in said


async def test_a_closed_half_behind_a_second_request_spoils_no_stream() -> None:
    async with serving(delay_s=0.05) as server, connecting() as connect:
        both = post(hello("a b c d", stream=True)) + post(hello("second"))
        ends = await connect(server, both)
        said = await ends[0].read(2**16)
        ends[1].write_eof()
        said += await rest_of(ends)
        first, _, second = said.partition(b"data: [DONE]")
        assert b"HTTP/1.1 100" not in first
        assert b"second" in second


@pytest.mark.parametrize("first", [hello(), hello(stream=True)])
async def test_who_leaves_two_requests_is_waited_for_by_neither(first: dict[str, Any]) -> None:
    async with serving(engine=Held()) as server, connecting() as connect:
        await left(server, connect, post(first) + post(hello("second")), reset=False)
        await until(nothing_left(server))


async def left(server: Served, connect: Any, sent: bytes, *, reset: bool) -> None:
    """Sends this, waits until the engine has it, and leaves."""
    engine = server.engine
    assert isinstance(engine, Held)
    before = engine.held
    _, writer = await connect(server, sent)
    await until(lambda: engine.held == before + 1)
    if reset:
        taken = writer.get_extra_info("socket")
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    writer.close()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("fields", [{}, {"stream": True}])
async def test_who_leaves_is_not_taken_for_one_that_waits(
    fields: dict[str, Any], reset: bool
) -> None:
    async with serving(engine=Held()) as server, connecting() as connect:
        await left(server, connect, post(hello(**fields)), reset=reset)
        await until(nothing_left(server))


async def test_a_half_that_is_closed_too_early_is_an_end() -> None:
    async with serving() as server, connecting() as connect:
        for sent in (post(hello())[:-9], b"POST /v1/chat", b""):
            ends = await connect(server, sent)
            ends[1].write_eof()
            assert b"200 OK" not in await rest_of(ends)
        await until(nothing_left(server))


async def test_http_1_0() -> None:
    async with serving() as server, connecting() as connect:
        ends = await connect(server, post(hello()).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert said(await answer_of(ends)) == "one two three"
        assert await rest_of(ends) == b"", "closed, as nothing else was asked for"
        ends = await connect(server, b"GET /health/live HTTP/1.0\r\n\r\n")
        assert b"live" in await rest_of(ends), "without a Host"


async def test_a_body_that_waits_to_be_asked_for() -> None:
    async with serving() as server, connecting() as connect:
        head, _, body = post(hello(), "Expect: 100-continue").partition(b"\r\n\r\n")
        ends = await connect(server, head + b"\r\n\r\n")
        assert (await answer_of(ends))[0] == 100
        ends[1].write(body)
        assert said(await answer_of(ends)) == "one two three"
        # Refused before it is asked for, the body never comes.
        head = head.replace(b"Content-Length: %d" % len(body), b"Content-Length: 999999999")
        ends = await connect(
            server,
            head.replace(b"content-length: %d" % len(body), b"content-length: 999999999")
            + b"\r\n\r\n",
        )
        assert (await answer_of(ends))[0] == 413


async def test_requests_that_do_not_wait_for_answers() -> None:
    async with serving() as server, connecting() as connect:
        texts = [f"number {n}" for n in range(20)]
        ends = await connect(server, b"".join(post(hello(text)) for text in texts))
        assert [said(await answer_of(ends)) for _ in texts] == texts


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.thorough)])
async def test_many_connections_that_stay(count: int) -> None:
    async with serving() as server, connecting() as connect:
        everybody = [await connect(server) for _ in range(count)]
        for _ in range(2):
            for ends in everybody:
                ends[1].write(post(hello("a")))
            for ends in everybody:
                assert said(await answer_of(ends)) == "a"


async def test_the_version_of_an_offer_stays() -> None:
    async with serving() as server, connecting() as connect:
        request = post(hello(), *OFFER).replace(b"HTTP/1.1", b"HTTP/1.0")
        ends = await connect(server, request)
        assert said(await answer_of(ends)) == "one two three"
        assert await rest_of(ends) == b"", "1.0 is closed"


async def test_options_of_everything() -> None:
    async with serving() as server, connecting() as connect:
        ends = await connect(server, b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer_of(ends))[0] == 204
