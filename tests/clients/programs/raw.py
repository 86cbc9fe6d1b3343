"""HTTP by hand, for the programs that look at what is on the wire."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

from common import BASE_URL, CAPITAL, KEY, MAX_TOKENS, MODEL, said

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": MAX_TOKENS}
ASKED: Any = {"role": "user", "content": CAPITAL}
NO_ANSWER_S = 30.0


def connect() -> socket.socket:
    where = urlsplit(BASE_URL)
    found = socket.create_connection((where.hostname or "", where.port or 80), NO_ANSWER_S)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def head_of(path: str, method: str = "POST", version: str = "1.1", **headers: str | None) -> bytes:
    """A request's head; `None` leaves a usual header out, `_` in a name is `-`."""
    usual: dict[str, str | None] = {"Host": urlsplit(BASE_URL).netloc}
    usual |= {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    usual |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in usual.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/{version}", *lines, "", ""]).encode()


def body_of(**more: Any) -> bytes:
    return json.dumps({**GREEDY, "messages": [ASKED], **more}).encode()


def read(
    connection: socket.socket, method: str = "POST"
) -> tuple[int, str, http.client.HTTPMessage]:
    answer = http.client.HTTPResponse(connection, method=method)
    answer.begin()
    return answer.status, answer.read().decode(), answer.headers


def sent(path: str, body: bytes, **headers: str) -> tuple[int, str]:
    with connect() as connection:
        connection.sendall(head_of(path, Content_Length=str(len(body)), **headers) + body)
        return read(connection)[:2]


def good(answer: tuple[Any, ...]) -> Any:
    """A whole chat's or completion's text."""
    status, text = answer[:2]
    if status != 200:
        raise AssertionError(f"status {status}: {text[:700]}")
    choice = json.loads(text)["choices"][0]
    return said(choice["text"] if "text" in choice else choice["message"]["content"])
