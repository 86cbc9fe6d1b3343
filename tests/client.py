"""What HTTP tests share: bodies, events, metrics, and a connection that can be cut off."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import Server

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def metric(http: httpx.Client, name: str) -> float:
    """The value of a series, named with all of its labels but the model; one that has not been
    counted yet is 0.
    """
    page = re.sub(r'(?<={)model="[^"]*",?|,model="[^"]*"', "", http.get("/metrics").text)
    page = page.replace("{}", "")
    lines = [line for line in page.splitlines() if line.startswith(name + " ")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def request_lines(log: str | pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The lines that requests have left, read: in a server's log, or in what was captured."""
    if isinstance(log, str):
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        return [line for line in lines if "request_id" in line]
    return [record.request for record in log.records if hasattr(record, "request")]


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    found = (part for part in response.text.split("\n\n") if part)
    parts = [part.removeprefix("data: ") for part in found if not part.startswith(":")]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


def fuzzed_requests(model: str, count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(path, body) of good requests with one or two fields changed, or with bytes flipped.

    Some stay good, so that the engine sees odd but valid values too.
    """
    rng = random.Random(seed)
    values: list[Any] = [
        None, True, -1, 0, 1, 7, 10**9, 10**30, 1e308, 0.5, "", "x", [], {}, [[]], [None], [1, 2],
        {"a": {"b": []}}, "\x00", "🐴" * 50, ["a", "b"], [{"role": "user", "content": "\x00"}],
    ]  # fmt: skip
    fields = [
        "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed",
        "stop", "stream", "stream_options", "min_tokens", "min_p", "repetition_penalty", "n",
        "tools", "user", "ignore_eos", "max_completion_tokens", "unheard_of",
    ]  # fmt: skip
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 5000}}]
    for _ in range(count):
        path = rng.choice([CHAT, TEXT])
        messages: list[dict[str, Any]] = [{"role": "user", "content": "one"}]
        if rng.random() < 0.1:
            messages.append({"role": "assistant", "tool_calls": calls})
        body: dict[str, Any] = {"model": model, "max_tokens": 4}
        body |= {"messages": messages} if path == CHAT else {"prompt": "one"}
        for _ in range(rng.choice([1, 1, 2])):
            body[rng.choice(fields)] = rng.choice(values)
        raw = bytearray(json.dumps(body).encode())
        if rng.random() < 0.3:
            for _ in range(rng.randint(1, 3)):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        yield path, bytes(raw)
    # Half a surrogate pair as bytes, as a stop string: valid to a careless decoder.
    yield TEXT, b'{"model": "%s", "prompt": "one", "stop": "\xed\xa0\x80"}' % model.encode()


def fuzz(http: httpx.Client, model: str, seed: int) -> None:
    """201 odd requests: none may be answered with 5xx, and some must get through to the engine."""
    statuses = []
    for path, body in fuzzed_requests(model, 200, seed):
        response = http.post(path, content=body)
        assert response.status_code < 500, (path, body, response.text)
        statuses.append(response.status_code)
    assert statuses.count(200) >= 10
    assert statuses.count(400) > 80


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """For what must come; the limit is generous, as how fast it comes is for bench/ to say."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s"
        time.sleep(0.02)


def children(pid: int) -> list[psutil.Process]:
    """All processes below this one."""
    return psutil.Process(pid).children(recursive=True)


def is_there(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and is listed still does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def address_of(server: Server) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def hello(text: str = "one two three", **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **fields}


def send_raw(
    connection: socket.socket,
    path: str,
    body: dict[str, Any],
    headers: dict[str, str] | None = None,
) -> None:
    """POST over a bare socket, which the test may then close."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    connection.sendall(head.encode() + b"\r\n" + content)
