"""What HTTP tests share: bodies, events, metrics, and a connection that can be cut off."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from tests.conftest import Server

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def metric(http: httpx.Client, name: str) -> float:
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name + " ")]
    return float(lines[0].rpartition(" ")[2])


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


def malformed_bodies(count: int, seed: int = 0) -> Iterator[bytes]:
    """Good bodies with a field changed, removed or added, or with bytes flipped."""
    rng = random.Random(seed)
    values: list[Any] = [
        None, True, -1, 0, 10**30, 1e308, "", "x", [], {}, [[]], [None], {"a": {"b": []}}, "\x00",
        "🐴" * 50,
    ]  # fmt: skip
    fields = [
        "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed",
        "stop", "stream", "stream_options", "min_tokens", "n", "tools", "user", "unheard_of",
    ]  # fmt: skip
    for _ in range(count):
        body: dict[str, Any] = {**hello(), "prompt": "one"}
        for _ in range(rng.randint(1, 3)):
            field = rng.choice(fields)
            if rng.random() < 0.2:
                body.pop(field, None)
            else:
                body[field] = rng.choice(values)
        raw = bytearray(json.dumps(body).encode())
        if rng.random() < 0.4:
            for _ in range(rng.randint(1, 5)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        yield bytes(raw)


def wait_for(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def address_of(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def hello(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def send_raw(connection: socket.socket, path: str, body: dict[str, Any]) -> None:
    """POST over a bare socket, which the test may then close."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
