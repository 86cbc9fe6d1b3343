"""What the conformance tests are made of: a row of the tables, a plain vLLM server, and answers as
both servers give them, cut down to what must be the same.

The rows are in `conformance_good.py`, `conformance_bad.py` and `conformance_prompts.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.client import CHAT, TEXT, events
from tests.conftest import DEMO

MODEL = "demo"
MAX_MODEL_LEN = 256
KV_CACHE_BYTES = 2**28
# How far logprobs may differ. bf16 sums depend on how many tokens share a step, and prompts of one
# request or choices of one prompt may be admitted in one step or in two; one by one they are equal.
LOGPROB_TOLERANCE = 1e-2
ABSENT: Any = object()  # a value that takes a default field out of the body


@dataclass(frozen=True)
class Row:
    """One request, and the status that each server must answer it with."""

    name: str
    path: str
    body: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    """Plain vLLM's."""
    ours: int | None = None
    """Where it differs on purpose; None asks for the same class as plain vLLM's."""
    why: str = ""
    """The reason for the difference."""
    raw: bytes | None = None
    """The content instead of the body, where it is no JSON object."""
    method: str = "POST"

    def streamed(self) -> Row:
        """The same request as a stream that ends with its usage."""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return Row(f"{self.name}, streamed", self.path, {**self.body, **options})


def chat(name: str, content: Any = "What is the capital of Felonia?", **fields: Any) -> Row:
    """A greedy chat of one user message; `fields` are added or, where ABSENT, left out."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_completion_tokens": 24,
    }
    return Row(name, CHAT, changed(body, fields))


def text(name: str, prompt: Any = "The capital of Felonia is", **fields: Any) -> Row:
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 12}
    return Row(name, TEXT, changed(body, fields))


def changed(body: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**body, **fields}.items() if value is not ABSENT}


@dataclass(frozen=True)
class Answer:
    """What came back; `body` is the JSON object, or the list of a stream's events."""

    status: int
    body: Any


def send(http: httpx.Client, row: Row) -> Answer:
    if row.raw is not None:
        headers = {"content-type": "application/json"}
        response = http.request(row.method, row.path, content=row.raw, headers=headers)
    elif row.method == "GET":
        response = http.get(row.path)
    else:
        response = http.request(row.method, row.path, json=row.body)
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return Answer(response.status_code, events(response))
    try:
        return Answer(response.status_code, response.json())
    except json.JSONDecodeError:
        return Answer(response.status_code, response.text)


@contextmanager
def plain_vllm(folder: Path, *, start_timeout_s: float = 240) -> Iterator[httpx.Client]:
    """vLLM's own server on the demo model, ready; its log in `folder`. Gone when this returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", DEMO / "model",
        "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", port, "--enforce-eager",
        "--max-model-len", MAX_MODEL_LEN, "--kv-cache-memory-bytes", KV_CACHE_BYTES,
        # Without the cache an answer does not depend on the requests before it.
        "--no-enable-prefix-caching", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ]  # fmt: skip
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    log_path = folder / "plain-vllm.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, **quiet},
            start_new_session=True,
        )
    try:
        # vLLM closes the connection after some errors, a moment later: a new one for each request.
        limits = httpx.Limits(max_keepalive_connections=0)
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=120, limits=limits) as http:
            _wait_until_healthy(http, process, log_path, start_timeout_s)
            yield http
    finally:
        _stop(process)


def _wait_until_healthy(
    http: httpx.Client, process: subprocess.Popen[bytes], log_path: Path, timeout_s: float
) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    tail = log_path.read_text(encoding="utf-8", errors="replace")[-4000:]
    raise AssertionError(f"plain vLLM is not ready after {timeout_s} s:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server; what is left of its process group after that is killed."""
    if process.poll() is None:
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def view(row: Row, answer: Answer) -> dict[str, Any]:
    """What must be the same on both servers, in one shape for whole answers and for streams."""
    body = join(answer.body) if isinstance(answer.body, list) else answer.body
    # An echo brings these along unasked, other ones when streamed than when whole.
    prompt = []
    if row.body.get("return_token_ids"):
        prompt.append("prompt_token_ids")
    if row.body.get("prompt_logprobs") is not None:
        prompt.append("prompt_logprobs")
    usage = body.get("usage") or {}
    return {
        "choices": [_choice(choice, prompt) for choice in body["choices"]],
        "usage": {
            name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        },
        **{name: body.get(name) for name in prompt},
    }


def _choice(choice: dict[str, Any], prompt: list[str]) -> dict[str, Any]:
    message = choice.get("message", {})
    return {
        "index": choice["index"],
        "text": choice.get("text", message.get("content")) or "",
        "reasoning": message.get("reasoning") or "",
        "tool_calls": [
            (call["function"]["name"], _parsed(call["function"]["arguments"]))
            for call in message.get("tool_calls") or []
        ],
        **{
            name: choice.get(name)
            for name in ("finish_reason", "stop_reason", "logprobs", "token_ids", *prompt)
        },
    }


def _parsed(arguments: str) -> Any:
    """A call's arguments; the spaces between them may differ."""
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        return arguments


def join(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream's events put together to the body that the same request gets unstreamed."""
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for name in ("usage", "prompt_token_ids"):
            if chunk.get(name) is not None:
                whole[name] = chunk[name]
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"index": part["index"]})
            _join_choice(choice, part)
    return {**whole, "choices": [choices[index] for index in sorted(choices)]}


def _join_choice(choice: dict[str, Any], part: dict[str, Any]) -> None:
    if "text" in part:
        choice["text"] = choice.get("text", "") + part["text"]
    for name in ("finish_reason", "stop_reason", "prompt_token_ids"):
        if part.get(name) is not None:
            choice[name] = part[name]
    if part.get("token_ids") is not None:
        choice.setdefault("token_ids", []).extend(part["token_ids"])
    for name, values in (part.get("logprobs") or {}).items():
        choice.setdefault("logprobs", {}).setdefault(name, []).extend(values)
    if (delta := part.get("delta")) is not None:
        message = choice.setdefault("message", {"tool_calls": []})
        for name in ("content", "reasoning"):
            message[name] = (message.get(name) or "") + (delta.get(name) or "")
        for call in delta.get("tool_calls") or []:
            _join_call(message["tool_calls"], call)


def _join_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    while len(calls) <= part["index"]:
        calls.append({"function": {"name": "", "arguments": ""}})
    for name, value in (part.get("function") or {}).items():
        calls[part["index"]]["function"][name] += value or ""


def differences(plain: Any, ours: Any, where: str = "") -> list[str]:
    """Every place where two views differ, in words; none when they agree.

    A number with a fraction may differ by LOGPROB_TOLERANCE; null and a missing key are the same.
    """
    if isinstance(plain, dict) and isinstance(ours, dict):
        keys = list(dict.fromkeys([*plain, *ours]))
        pairs = [(f"{where}.{key}", plain.get(key), ours.get(key)) for key in keys]
    elif isinstance(plain, list | tuple) and isinstance(ours, list | tuple):
        if len(plain) != len(ours):
            return [f"{where}: {len(plain)} items, ours {len(ours)}: {plain!r}, {ours!r}"]
        pairs = [
            (f"{where}[{index}]", *pair) for index, pair in enumerate(zip(plain, ours, strict=True))
        ]
    elif isinstance(plain, float) and isinstance(ours, float):
        far = abs(plain - ours) > LOGPROB_TOLERANCE
        return [f"{where}: {plain}, ours {ours}"] if far else []
    else:
        return [] if plain == ours else [f"{where}: {plain!r}, ours {ours!r}"]
    return [line for name, left, right in pairs for line in differences(left, right, name)]
