"""HTTP as clients of all kinds speak it: HEAD, slashes, codings, and comments in long waits."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import httpx
import pytest
import zstandard

from tests.client import CHAT, events, hello
from tests.integration.serving import Held, bearer, serving, until, write_keys

BODY = json.dumps(hello()).encode()


@pytest.mark.parametrize(
    "path", ["/health", "/health/live", "/health/ready", "/v1/models", "/metrics", "/openapi.json"]
)
async def test_head_is_get_without_the_body(path: str) -> None:
    async with serving() as server:
        got, head = await server.http.get(path), await server.http.head(path)
        assert head.status_code == got.status_code == 200
        assert head.content == b""
        assert head.headers["content-type"] == got.headers["content-type"]
        assert (await server.http.head(CHAT)).status_code == 405
        server.engine.dead = True
        assert (await server.http.head("/health/ready")).status_code == 503


async def test_options_names_the_methods() -> None:
    async with serving() as server:
        answer = await server.http.options(CHAT)
        assert (answer.status_code, answer.headers["allow"]) == (204, "POST")
        assert (await server.http.options("/v1/nothing")).status_code == 404


async def test_a_slash_at_the_end_is_no_other_place(tmp_path: Any) -> None:
    keys = write_keys(tmp_path / "keys.yaml", user={})
    async with serving(keys=keys) as server:
        proxied = {**bearer("user"), "x-forwarded-proto": "https", "host": "llm.example.org"}
        for headers in (bearer("user"), proxied):
            answer = await server.http.post(CHAT + "/", json=hello(), headers=headers)
            assert answer.status_code == 200, answer.text
            listed = await server.http.get("/v1/models/", headers=headers)
            assert listed.json()["object"] == "list"
        for path in (CHAT + "/", "/metrics/", "/admin/cache/", "/v1//"):
            answer = await server.http.get(path)
            assert answer.status_code == 401, path
        assert (await server.http.get("/health/live/")).status_code == 200
        assert (await server.http.get("/v1/nothing/", headers=bearer("user"))).status_code == 404


def _raw_deflate(data: bytes) -> bytes:
    made = zlib.compressobj(wbits=-15)
    return made.compress(data) + made.flush()


GOOD: list[tuple[str, bytes]] = [
    ("gzip", gzip.compress(BODY)),
    ("x-gzip", gzip.compress(BODY)),
    ("GZIP", gzip.compress(BODY)),
    ("deflate", zlib.compress(BODY)),
    ("deflate", _raw_deflate(BODY)),
    ("zstd", zstandard.compress(BODY)),
    ("zstd", zstandard.ZstdCompressor(write_content_size=False).compress(BODY)),
    ("identity", BODY),
    ("", BODY),
    ("gzip, identity", gzip.compress(BODY)),
    ("deflate, gzip", gzip.compress(zlib.compress(BODY))),
    ("gzip", gzip.compress(BODY[:20]) + gzip.compress(BODY[20:]) + bytes(9)),
    ("zstd", zstandard.compress(BODY[:20]) + zstandard.compress(BODY[20:])),
]


@pytest.mark.parametrize(("coding", "body"), GOOD, ids=range(len(GOOD)))
async def test_compressed_bodies_are_read(coding: str, body: bytes) -> None:
    async with serving() as server:
        headers = {"content-encoding": coding}
        answer = await server.http.post(CHAT, content=body, headers=headers)
        assert answer.status_code == 200, answer.text


BOMB = b" " * 50_000_000
BAD: list[tuple[str, bytes, int, str]] = [
    ("br", BODY, 415, "send gzip, deflate, zstd"),
    ("gzip, gzip, gzip", BODY, 415, "is not understood"),
    ("gzip", BODY, 400, "not valid gzip"),
    ("gzip", gzip.compress(BODY)[:-9], 400, "not valid gzip"),
    ("deflate", b"", 400, "not valid deflate"),
    ("zstd", BODY, 400, "not valid zstd"),
    ("zstd", zstandard.compress(BODY)[:-2], 400, "not valid zstd"),
    ("gzip", gzip.compress(BODY) + b"garbage", 400, "not valid gzip"),
    ("deflate", zlib.compress(BODY) * 2, 400, "not valid deflate"),
    ("gzip", gzip.compress(b"\xff{}"), 400, "not valid UTF-8"),
    ("gzip", gzip.compress(BOMB), 413, "decoded"),
    ("deflate", zlib.compress(BOMB), 413, "decoded"),
    ("zstd", zstandard.compress(BOMB), 413, "decoded"),
    ("gzip, gzip", gzip.compress(gzip.compress(BOMB)), 413, "decoded"),
]


@pytest.mark.parametrize(("coding", "body", "status", "message"), BAD, ids=range(len(BAD)))
async def test_what_cannot_be_decoded_is_refused(
    coding: str, body: bytes, status: int, message: str
) -> None:
    async with serving() as server:
        headers = {"content-encoding": coding}
        answer = await server.http.post(CHAT, content=body, headers=headers)
        assert answer.status_code == status, answer.text
        assert message in answer.json()["error"]["message"]
        if status == 415:
            assert answer.headers["accept-encoding"] == "gzip, deflate, zstd"
        assert (await server.http.post(CHAT, json=hello())).status_code == 200


async def test_a_mark_in_front_of_the_json_is_passed_over() -> None:
    async with serving() as server:
        for path, body in ((CHAT, BODY), ("/tokenize", b'{"prompt": "a b"}')):
            answer = await server.http.post(path, content=b"\xef\xbb\xbf" + body)
            assert answer.status_code == 200, answer.text


async def test_a_stream_tells_proxies_to_pass_it_on() -> None:
    async with serving() as server:
        answer = await server.http.post(CHAT, json=hello(stream=True))
        assert answer.headers["x-accel-buffering"] == "no"


async def lines_of(response: httpx.Response, count: int) -> list[str]:
    found: list[str] = []
    async for line in response.aiter_lines():
        found.append(line)
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("prompts", [1, 2])
async def test_a_long_wait_for_the_first_token_is_told_with_comments(prompts: int) -> None:
    engine = Held()
    async with serving(engine=engine, http={"heartbeat_s": 0.05}) as server:
        body = {"model": "echo", "prompt": ["a b"] * prompts, "stream": True}
        async with server.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            assert [await anext(lines) for _ in range(4)] == [": waiting", "", ": waiting", ""]
            engine.go.set()
            rest = [line async for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        said = [json.loads(line[6:]) for line in rest[:-1]]
        texts = ["", ""]
        for event in said:
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts[:prompts] == ["a b"] * prompts


async def test_what_goes_wrong_after_a_long_wait_is_the_last_event() -> None:
    engine = Held()
    async with serving(engine=engine, http={"heartbeat_s": 0.05}) as server:
        body = hello("!dead", stream=True)
        async with server.http.stream("POST", CHAT, json=body) as response:
            lines = response.aiter_lines()
            assert await anext(lines) == ": waiting"
            engine.go.set()
            rest = [line async for line in lines if line.startswith("data: ")]
        assert json.loads(rest[0][6:])["error"]["kind"] == "unavailable"
        assert rest[1:] == ["data: [DONE]"]
        # And who waited less gets a status.
        assert (await server.http.post(CHAT, json=body)).status_code == 503


async def test_a_client_that_leaves_while_it_is_told_to_wait_ends_its_request() -> None:
    engine = Held()
    async with serving(engine=engine, http={"heartbeat_s": 0.05}) as server:
        async with server.http.stream("POST", CHAT, json=hello(stream=True)) as response:
            assert await lines_of(response, 1) == [": waiting"]
        await until(lambda: server.pipeline.admission.running == 0)
        assert engine.running == 0


async def test_a_silence_between_tokens_is_told_too() -> None:
    async with serving(delay_s=0.3, http={"heartbeat_s": 0.05}) as server:
        async with server.http.stream("POST", CHAT, json=hello("a b c", stream=True)) as response:
            lines = [line async for line in response.aiter_lines() if line]
        first = next(n for n, line in enumerate(lines) if '"a"' in line)
        assert ": waiting" in lines[first:], "between the first word and the last"
        answer = await server.http.post(CHAT, json=hello("a b c", stream=True))
        words = [c["delta"].get("content") or "" for e in events(answer) for c in e["choices"]]
        assert "".join(words) == "a b c", "comments are no events"


async def test_without_heartbeats_a_wait_is_silent() -> None:
    async with serving(delay_s=0.2, http={"heartbeat_s": None}) as server:
        answer = await server.http.post(CHAT, json=hello(stream=True))
        assert ": waiting" not in answer.text
