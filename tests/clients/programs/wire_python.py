"""What other clients put on the wire, byte by byte: .NET's Expect: 100-continue, byte order marks,
chunks, Java's offers of HTTP/2, clients that half-close, compressed bodies, proxies.
"""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import time
import zlib
from typing import Any

from common import call, main
from raw import CHAT, body_of, connect, good, head_of, read, sent

UPGRADE = {
    "Connection": "Upgrade, HTTP2-Settings",
    "Upgrade": "h2c",
    "HTTP2-Settings": "AAEAAEAAAAIAAAAB",
}
SEGMENTS_APART_S = 0.2


def chunked(body: bytes, size: int = 40) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def offered(late: bool) -> Any:
    """S01: the body arrives, and the connection's next request too."""
    body = body_of()
    with connect() as connection:
        connection.sendall(head_of(CHAT, Content_Length=str(len(body)), **UPGRADE))
        if late:
            time.sleep(SEGMENTS_APART_S)
        connection.sendall(body)
        seen = good(read(connection))
        connection.sendall(head_of(CHAT, Content_Length=str(len(body))) + body)
        good(read(connection))
    return seen


@call
def upgrade() -> Any:
    body = body_of()
    with connect() as connection:
        connection.sendall(head_of(CHAT, Content_Length=str(len(body)), **UPGRADE) + body)
        return good(read(connection))


@call
def upgrade_late_body() -> Any:
    return offered(late=True)


@call
def upgrade_next_request() -> Any:
    return offered(late=False)


@call
def upgrade_chunked() -> Any:
    with connect() as connection:
        head = head_of(CHAT, Transfer_Encoding="chunked", **UPGRADE)
        connection.sendall(head + chunked(body_of()))
        return good(read(connection))


@call
def expect_continue() -> Any:
    """.NET and curl wait for the 100 before they send; it has to come."""
    body = body_of()
    with connect() as connection:
        connection.sendall(head_of(CHAT, Content_Length=str(len(body)), Expect="100-continue"))
        interim = connection.recv(25, socket.MSG_WAITALL)
        if interim != b"HTTP/1.1 100 Continue\r\n\r\n":
            raise AssertionError(f"no 100 Continue: {interim!r}")
        connection.sendall(body)
        return good(read(connection))


@call
def dotnet() -> Any:
    """All at once: the mark in front, chunks, Expect, and the charset in the content type."""
    kind = "application/json; charset=utf-8"
    with connect() as connection:
        head = head_of(CHAT, Transfer_Encoding="chunked", Expect="100-continue", Content_Type=kind)
        connection.sendall(head)
        connection.recv(25, socket.MSG_WAITALL)
        connection.sendall(chunked(b"\xef\xbb\xbf" + body_of()))
        return good(read(connection))


@call
def byte_order_mark() -> Any:
    return good(sent(CHAT, b"\xef\xbb\xbf" + body_of()))


@call
def chunks() -> Any:
    with connect() as connection:
        head = head_of(CHAT, Transfer_Encoding="chunked")
        for part in (head, *(bytes([byte]) for byte in chunked(body_of()))):
            connection.sendall(part)
        return good(read(connection))


def half_closed(**more: Any) -> str:
    body = body_of(**more)
    with connect() as connection:
        connection.sendall(head_of(CHAT, Content_Length=str(len(body))) + body)
        connection.shutdown(socket.SHUT_WR)
        status, text, _ = read(connection)
    if status != 200:
        raise AssertionError(f"status {status}: {text[:700]}")
    return text


@call
def half_close() -> Any:
    return good((200, half_closed()))


@call
def half_close_streamed() -> Any:
    text = half_closed(stream=True)
    if "data: [DONE]" not in text:
        raise AssertionError(f"broken off: {text[-300:]}")
    return {"events": text.count("data: {")}


@call
def gzip_body() -> Any:
    return good(sent(CHAT, gzip.compress(body_of()), Content_Encoding="gzip"))


@call
def deflate_body() -> Any:
    return good(sent(CHAT, zlib.compress(body_of()), Content_Encoding="deflate"))


@call
def identity_body() -> Any:
    return good(sent(CHAT, body_of(), Content_Encoding="identity"))


@call
def unknown_coding() -> Any:
    """Refused by its name: 415, and not for what the bytes look like."""
    status, text = sent(CHAT, gzip.compress(body_of()), Content_Encoding="x-packed")
    if status != 415:
        raise AssertionError(f"status {status}, not 415: {text[:300]}")
    return text[:300]


@call
def heads() -> Any:
    """S16: HEAD wherever GET is, without a body."""
    for path in ("/health", "/v1/models", "/metrics"):
        with connect() as connection:
            connection.sendall(head_of(path, "HEAD", Content_Type=None))
            status, text, _ = read(connection, "HEAD")
        if status != 200 or text:
            raise AssertionError(f"HEAD {path}: status {status}, body {text[:100]!r}")
    return {}


@call
def slash_behind_a_proxy() -> Any:
    """S17: served, or refused in JSON; never sent on to plain http with the key in the open."""
    body = body_of()
    forwarded = {"Host": "llm.example.org", "X_Forwarded_Proto": "https"}
    with connect() as connection:
        head = head_of(CHAT + "/", Content_Length=str(len(body)), **forwarded)
        connection.sendall(head + body)
        status, text, headers = read(connection)
    if "location" in headers:
        raise AssertionError(f"status {status} to {headers['location']}")
    return good((status, text)) if status == 200 else json.loads(text)


@call
def slash_after_models() -> Any:
    with connect() as connection:
        connection.sendall(head_of("/v1/models/", "GET", Content_Type=None))
        status, text, headers = read(connection)
    if status != 200:
        raise AssertionError(f"status {status}: {headers.get('location')} {text[:300]}")
    return {"models": [model["id"] for model in json.loads(text)["data"]]}


@call
def http_1_0() -> Any:
    body = body_of()
    with connect() as connection:
        head = head_of(CHAT, version="1.0", Content_Length=str(len(body)), Host=None)
        connection.sendall(head + body)
        return good(read(connection))


@call
def pipelined() -> Any:
    body = body_of()
    asked = head_of(CHAT, Content_Length=str(len(body))) + body
    with connect() as connection:
        connection.sendall(asked + asked)
        # A reader of its own for each answer would take in the beginning of the next one.
        with connection.makefile("rb") as file:
            texts = [_read_from(file) for _ in range(2)]
    return [good(text) for text in texts][1]


def _read_from(file: Any) -> tuple[int, str]:
    status = int(file.readline().split()[1])
    headers = http.client.parse_headers(file)
    return status, file.read(int(headers["content-length"])).decode()


if __name__ == "__main__":
    main()
