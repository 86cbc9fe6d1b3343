"""The programs curl and wget, called as people call them; CLIENT_COMMAND says which of the two."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import (
    BASE_URL,
    CAPITAL,
    GET_WEATHER,
    KEY,
    LONG,
    MAX_TOKENS,
    MODEL,
    RESULT,
    UNKNOWN_MODEL,
    WEATHER,
    WRONG_KEY,
    call,
    city_of,
    main,
    said,
    streamed,
)

WGET = os.environ["CLIENT_COMMAND"] == "wget"
ROOT = BASE_URL.removesuffix("/v1")
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": MAX_TOKENS}
ASKED: Any = [{"role": "user", "content": CAPITAL}]
CHAT = BASE_URL + "/chat/completions"


def sent(url: str, body: bytes | None = None, *more: str, key: str = KEY) -> tuple[int, str]:
    """(status, body) of the last answer; 0 where there was none."""
    headers = [f"Authorization: Bearer {key}"]
    if body is not None:
        headers.append("Content-Type: application/json")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "body"
        if WGET:
            command = ["wget", "--quiet", "--tries=1", "--timeout=60", "--output-document=-"]
            command += ["--server-response", "--content-on-error"]
            command += [f"--header={header}" for header in headers]
            command += [f"--post-file={file}"] if body is not None else []
        else:
            command = ["curl", "--http2", "--silent", "--show-error", "--max-time", "60"]
            command += [part for header in headers for part in ("-H", header)]
            command += ["--data-binary", f"@{file}"] if body is not None else []
            command += ["--write-out", "\n%{http_code}"]
        file.write_bytes(body or b"")
        done = subprocess.run([*command, *more, url], capture_output=True, text=True, check=False)
    if WGET:
        lines = [line.split() for line in done.stderr.splitlines()]
        codes = [int(words[1]) for words in lines if words and words[0].startswith("HTTP/")]
        return (codes[-1] if codes else 0), done.stdout or done.stderr
    text, _, code = done.stdout.rpartition("\n")
    return int(code or 0), text or done.stderr


def got(status: int, answer: tuple[int, str]) -> str:
    if answer[0] != status:
        raise AssertionError(f"status {answer[0]}, not {status}: {answer[1][:700]}")
    return answer[1]


def asked(**more: Any) -> bytes:
    return json.dumps({**GREEDY, "messages": ASKED, **more}).encode()


def text_of(answer: str) -> Any:
    return said(json.loads(answer)["choices"][0]["message"]["content"])


@call
def chat() -> Any:
    return text_of(got(200, sent(CHAT, asked())))


@call
def stream() -> Any:
    answer = got(200, sent(CHAT, asked(stream=True, stream_options={"include_usage": True})))
    lines = [line.removeprefix("data: ") for line in answer.splitlines() if line[:5] == "data:"]
    if lines.pop() != "[DONE]":
        raise AssertionError(f"no [DONE] at the end: {answer[-300:]}")
    chunks = [json.loads(line) for line in lines]
    parts = [c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]]
    return streamed(parts, (chunks[-1].get("usage") or {}).get("completion_tokens"))


@call
def tools() -> Any:
    """The answer's own message goes back, every field of it."""
    question = {"role": "user", "content": WEATHER}
    forced = asked(messages=[question], tools=[GET_WEATHER], tool_choice="required")
    message = json.loads(got(200, sent(CHAT, forced)))["choices"][0]["message"]
    wanted = message["tool_calls"][0]
    result = {"role": "tool", "tool_call_id": wanted["id"], "content": RESULT}
    history = asked(messages=[question, message, result], tools=[GET_WEATHER])
    city = city_of(wanted["function"]["arguments"])
    return {"city": city, **text_of(got(200, sent(CHAT, history)))}


@call
def wrong_key() -> Any:
    return got(401, sent(CHAT, asked(), key=WRONG_KEY))[:300]


@call
def unknown_model() -> Any:
    return got(404, sent(CHAT, asked(model=UNKNOWN_MODEL)))[:300]


@call
def too_long() -> Any:
    """Above curl's 1 MiB it would ask with Expect: 100-continue; see wire_python.py for that."""
    text = got(400, sent(CHAT, asked(messages=[{"role": "user", "content": LONG}])))
    if "maximum context length" not in text:
        raise AssertionError(f"refused for something else: {text[:300]}")
    return text[:300]


@call
def models() -> Any:
    names = [model["id"] for model in json.loads(got(200, sent(BASE_URL + "/models")))["data"]]
    return {"models": names}


@call
def head() -> Any:
    """S16: what uptime monitors ask."""
    flag = "--spider" if WGET else "--head"
    for url in (ROOT + "/health", BASE_URL + "/models"):
        got(200, sent(url, None, flag))
    return {}


@call
def compressed() -> Any:
    """S20."""
    body, header = gzip.compress(asked()), "Content-Encoding: gzip"
    more = [f"--header={header}"] if WGET else ["-H", header]
    return text_of(got(200, sent(CHAT, body, *more)))


if __name__ == "__main__":
    main()
