"""More connections, slower ones and larger requests than a client with good manners would send."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from packhorse.serve.rest import server as listen
from tests.client import CHAT, hello
from tests.integration.raw_http import (
    GET_LIVE,
    HALF,
    Connect,
    Ends,
    answer_of,
    connections,
    post,
    rest_of,
)
from tests.integration.serving import (
    Held,
    Served,
    bearer,
    nothing_left,
    serving,
    until,
    write_keys,
)


def cut(server: Served, reason: str) -> float:
    counter: Any = server.metrics.connections_cut.labels(reason)
    return float(counter._value.get())


async def test_connections_that_ask_nothing_make_room(connect: Connect) -> None:
    async with serving(http={"max_connections": 4}) as server:
        before = cut(server, "made_room")
        idle = [await connect(server, sent) for sent in (b"", b"POST", b"GET / HTTP/1.1\r\na", b"")]
        await until(lambda: connections(server) == 4)
        assert (await server.http.post(CHAT, json=hello())).status_code == 200
        assert await rest_of(idle[0]) == b""
        assert cut(server, "made_room") == before + 1
        # The others are still there, and the second is answered once it has asked.
        idle[1][1].write(post(hello())[4:])
        assert (await answer_of(idle[1]))[0] == 200
        assert connections(server) == 4


async def test_an_idle_connection_makes_room_if_nothing_was_heard_of_it_for_longest(
    connect: Connect,
) -> None:
    async with serving(http={"max_connections": 3}) as server:
        idle = [await connect(server, GET_LIVE) for _ in range(2)]
        for ends in idle:
            assert (await answer_of(ends))[0] == 200
        half = await connect(server, post(hello())[:9])
        idle[0][1].write(GET_LIVE)
        assert (await answer_of(idle[0]))[0] == 200
        assert (await server.http.get("/health/live")).status_code == 200
        assert await rest_of(idle[1]) == b""
        half[1].write(post(hello())[9:])
        assert (await answer_of(half))[0] == 200
        assert connections(server) == 3


async def test_where_all_have_work_one_more_is_turned_away(connect: Connect) -> None:
    engine = Held()
    async with serving(engine=engine, http={"max_connections": 2}) as server:
        busy = [await connect(server, post(hello())) for _ in range(2)]
        await until(lambda: engine.held == 2)
        extra = await connect(server, GET_LIVE)
        status, headers, body = await answer_of(extra)
        assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
        assert json.loads(body)["error"]["kind"] == "unavailable"
        assert await rest_of(extra) == b""
        engine.go.set()
        assert [(await answer_of(ends))[0] for ends in busy] == [200, 200]
        busy[0][1].close()
        await until(lambda: connections(server) == 1)
        assert (await server.http.get("/health/live")).status_code == 200


@pytest.mark.parametrize(
    ("sent", "dribbled", "status"),
    [
        (b"", b"", None),
        (b"POST /v1/chat/compl", b"", 408),
        (b"GET / HTTP/1.1\r\nhost: x\r\n", b"a: b\r\n", 408),
        (GET_LIVE, b"\r\n", 200),  # between two requests, which stops uvicorn's own timer
        (GET_LIVE + b"GET /", b"x", 200),
    ],
)
async def test_headers_that_do_not_come_in_time(
    sent: bytes, dribbled: bytes, status: int | None, connect: Connect
) -> None:
    async with serving(http={"header_timeout_s": 0.3}) as server:
        ends = await connect(server, sent)

        async def dribble() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    await asyncio.sleep(0.02)
                    ends[1].write(dribbled)
                    await ends[1].drain()

        dribbling = asyncio.create_task(dribble())
        said = await rest_of(ends)
        dribbling.cancel()
        assert said.startswith(b"" if status is None else f"HTTP/1.1 {status} ".encode())
        assert bool(said) == (status is not None)
        await until(lambda: connections(server) == 0)
        assert (await server.http.get("/health/live")).status_code == 200


async def test_a_body_that_nobody_wants_is_not_waited_for(tmp_path: Path, connect: Connect) -> None:
    keys = write_keys(tmp_path / "keys.yaml", good={})
    async with serving(keys=keys, http={"header_timeout_s": 0.3}) as server:
        ends = await connect(server, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + HALF)
        ends[1].write(b"x" * 100_000)
        assert (await answer_of(ends))[0] == 401
        (kept,) = server.listeners._connections._open
        await until(lambda: kept.cycle.response_complete)
        assert not kept.cycle.body
        ends[1].write(b"x" * 1000)
        assert await rest_of(ends) == b""
        assert server.pipeline.admission.bodies.held == 0


async def test_the_connection_goes_on_after_a_body_that_nobody_wanted(
    tmp_path: Path, connect: Connect
) -> None:
    keys = write_keys(tmp_path / "keys.yaml", good={})
    async with serving(keys=keys) as server:
        asked = post(hello("word " * 50_000))
        ends = await connect(server, asked[:1000])
        assert (await answer_of(ends))[0] == 401
        ends[1].write(asked[1000:] + post(hello("one"), "authorization: Bearer key-good"))
        assert (await answer_of(ends))[0] == 200
        ends[1].write(GET_LIVE)
        assert (await answer_of(ends))[0] == 200


@pytest.mark.parametrize("pieces", [1, 50])
@pytest.mark.parametrize("what", ["one", "many", "target", "unfinished"])
async def test_headers_above_the_limit(what: str, pieces: int, connect: Connect) -> None:
    async with serving(http={"max_header_bytes": 4096}) as server:
        before = cut(server, "large")
        lines = {
            "one": b"GET / HTTP/1.1\r\na: " + b"x" * 9000 + b"\r\n\r\n",
            "many": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1500 + b"\r\n",
            "target": b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
            "unfinished": b"GET / HTTP/1.1\r\na: " + b"x" * 9000,
        }[what]
        ends = await connect(server)
        step = len(lines) // pieces
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(lines), step):
                ends[1].write(lines[start : start + step])
                await ends[1].drain()
                await asyncio.sleep(0)
            if what == "unfinished":  # one piece has no end to be measured by: more must come
                await asyncio.sleep(0.05)
                ends[1].write(b"x" * 5000)
        said = await rest_of(ends)
        assert said.startswith(b"HTTP/1.1 431 ") or not said  # a reset may overtake it
        await until(lambda: connections(server) == 0)
        assert cut(server, "large") == before + 1
        fits = {"a": "x" * 3500}
        assert (await server.http.get("/health/live", headers=fits)).status_code == 200


CHUNKED = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()


@pytest.mark.parametrize("end", [b"0\r\na: ", b"0\r\n", b"1;a="])
async def test_what_follows_a_body_without_an_end(end: bytes, connect: Connect) -> None:
    """Trailers and chunks' extensions: nobody reads them, and the parser would keep the first."""
    async with serving(http={"max_header_bytes": 4096}) as server:
        before = cut(server, "large")
        ends = await connect(server, CHUNKED + b"2\r\n{}\r\n" + end)
        line = b"a: b\r\n" * 100 if end == b"0\r\n" else b"x" * 600
        with contextlib.suppress(ConnectionError):
            while cut(server, "large") == before:
                ends[1].write(line)
                await ends[1].drain()
                await asyncio.sleep(0)
        assert await rest_of(ends) == b""
        await until(nothing_left(server))


async def test_trailers_are_no_headers(connect: Connect) -> None:
    async with serving() as server:
        body = json.dumps(hello()).encode()
        sent = CHUNKED + f"{len(body):x}\r\n".encode() + body
        ends = await connect(server, sent + b"\r\n0\r\nx-request-id: late\r\na: b\r\n\r\n")
        status, headers, _ = await answer_of(ends)
        assert (status, headers["x-request-id"] == "late") == (200, False)


async def test_answers_to_requests_at_once_must_be_read() -> None:
    """Each waits for the one before it, which waits for its reader."""
    async with serving(http={"stalled_client_timeout_s": 0.3}) as server:
        before = cut(server, "unread")
        with socket.socket() as bare:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            bare.connect(server.address)
            bare.setblocking(False)
            asked = post(hello("w" * 1_000_000))
            loop = asyncio.get_running_loop()
            sending = asyncio.ensure_future(loop.sock_sendall(bare, asked * 10))
            await until(lambda: connections(server) == 1)
            await until(lambda: connections(server) == 0)
            with contextlib.suppress(ConnectionError):
                await sending
        assert cut(server, "unread") == before + 1
        await until(nothing_left(server))


async def test_many_headers_of_few_bytes(connect: Connect) -> None:
    async with serving() as server:
        ends = await connect(server, b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 300)
        assert (await rest_of(ends)).startswith(b"HTTP/1.1 431 ")
        some = await connect(server, GET_LIVE[:-2] + b"a:\r\n" * 200 + b"\r\n")
        assert (await answer_of(some))[0] == 200


async def test_a_header_that_begins_behind_a_request(connect: Connect) -> None:
    async with serving(http={"header_timeout_s": 0.3, "keep_alive_s": 60}) as server:
        ends = await connect(server, GET_LIVE + GET_LIVE[:20])
        assert (await answer_of(ends))[0] == 200
        assert (await rest_of(ends)).startswith(b"HTTP/1.1 408 ")


async def test_few_requests_may_wait_on_one_connection(connect: Connect) -> None:
    async with serving() as server:
        some = await connect(server, GET_LIVE * 20)
        assert [(await answer_of(some))[0] for _ in range(20)] == [200] * 20
        many = await connect(server, GET_LIVE * 3000)
        assert (await rest_of(many)).count(b"HTTP/1.1 200") < 100
        await until(lambda: connections(server) == 1)


async def test_one_keys_bodies_leave_room_for_anothers(tmp_path: Path, connect: Connect) -> None:
    keys = write_keys(tmp_path / "keys.yaml", greedy={}, good={})
    limits = {"max_bodies_bytes": 2**20}
    async with serving(keys=keys, limits=limits) as server:
        bodies = server.pipeline.admission.bodies
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer key-greedy\r\n".encode()
        held = []
        for number in range(5):
            held.append(await connect(server, head + HALF + b"x" * 100_000))
            await until(lambda wanted=number + 1: bodies.held > wanted * 100_000)
        extra = await connect(server, head + HALF + b"x" * 100_000)
        status, headers, body = await answer_of(extra)
        assert (status, headers["retry-after"]) == (429, "1")
        error = json.loads(body)["error"]
        assert (error["kind"], str(2**20) in error["message"]) == ("overloaded", True)
        asked = hello("w" * 200_000)
        answers = await asyncio.gather(
            *(server.http.post(CHAT, json=asked, headers=bearer("good")) for _ in range(2))
        )
        assert [answer.status_code for answer in answers] == [200, 200]
        for ends in (*held, extra):
            ends[1].close()
        await until(nothing_left(server))
        await until(lambda: not bodies.held)


async def test_a_compressed_body_holds_what_comes_out_of_it() -> None:
    engine = Held()
    async with serving(engine=engine, limits={"max_bodies_bytes": 2**20}) as server:
        packed = gzip.compress(json.dumps(hello("w" * 400_000)).encode())
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        first = asyncio.create_task(server.http.post(CHAT, content=packed, headers=headers))
        await until(lambda: engine.held == 1)
        assert server.pipeline.admission.bodies.held > 400_000
        second = await server.http.post(CHAT, content=packed, headers=headers)
        assert second.status_code == 429
        engine.go.set()
        assert (await first).status_code == 200
        await until(lambda: not server.pipeline.admission.bodies.held)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"])
async def test_handshakes_that_never_end(sent: bytes, tmp_path: Path, connect: Connect) -> None:
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    made.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    made.private_key_pem.write_to_path(tmp_path / "server.key")
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    http: dict[str, Any] = {
        "tls_certificate": tmp_path / "server.pem", "tls_key": tmp_path / "server.key",
        "header_timeout_s": 0.5, "max_connections": 3,
    }  # fmt: skip
    async with serving(http=http, verify=trusted) as server:
        stuck = [await connect(server, sent) for _ in range(10)]
        await asyncio.gather(*(rest_of(ends) for ends in stuck))
        await until(lambda: connections(server) == 0)
        assert (await server.http.get("/health/live")).status_code == 200


async def test_a_client_that_does_not_read_its_answer_is_let_go() -> None:
    async with serving(
        http={"keep_alive_s": 1, "stalled_client_timeout_s": 0.3, "max_body_bytes": 2**24}
    ) as server:
        for last in ("connection: close", "connection: keep-alive"):
            with socket.socket() as bare:
                bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                bare.connect(server.address)
                bare.setblocking(False)
                asked = post(hello("w" * 8_000_000), last)
                await asyncio.get_running_loop().sock_sendall(bare, asked)
                await until(lambda: connections(server) == 1)
                await until(lambda: connections(server) == 0)


def test_no_more_connections_than_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = [(1024, 4096), (1024, 2**20), (2**20, 2**20)]
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(listen.resource, "getrlimit", lambda _: limits[0])
    monkeypatch.setattr(listen.resource, "setrlimit", lambda _, pair: changed.append(pair))
    assert listen.connections_possible(4096) == 4096 - listen.OTHER_FILES
    assert "4096 and the limit on open files 4096" in caplog.text
    assert listen.connections_possible(1000) == 1000
    limits[0] = limits[1]
    assert listen.connections_possible(4096) == 4096
    limits[0] = limits[2]
    assert listen.connections_possible(4096) == 4096
    assert changed == [(4096, 4096), (4096, 4096), (listen.ENOUGH_FILES, 2**20)]


async def test_good_clients_are_answered_while_others_only_connect(connect: Connect) -> None:
    async with serving(http={"max_connections": 50}) as server:
        rude: list[Ends] = []

        async def flood() -> None:
            for number in range(300):
                rude.append(await connect(server, (b"", b"POST / HTTP/1.1\r\nx")[number % 2]))

        flooding = asyncio.create_task(flood())
        async with httpx.AsyncClient(base_url=server.listeners.url, timeout=30) as http:
            while not flooding.done():
                assert (await http.post(CHAT, json=hello())).status_code == 200
        await flooding
        assert connections(server) <= 50
