"""What our own layers cost: CPU per streamed token with the echo engine, which costs next to none.

Four runs, so that each part can be told from its neighbours:

- in process: the ASGI app is called directly, with a `send` that keeps what it gets. This is
  parsing, service, and the making of events; the goal is for this.
- over a socket: `packhorse serve --engine echo` and the load client: more by uvicorn and the
  socket. Without a pause between tokens many events leave in one write: the least it can be.
- both again, paced: the engine sleeps before each token, so that every token wakes its request and
  is written by itself, as with a real engine. The sleeps cost CPU too: the same number of them
  without anything else is measured apart, to be subtracted.

Every figure is the median of several rounds. The engine's own work (detokenizing, the queue from
its core) is not in here.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop
from ladder import progress
from load import Load, LoadError, bodies, path_of, run_cell
from servers import MODEL, echo

GOAL_US = 25.0
ROUNDS = 5
PACE_S = 0.01
# The echo engine ends with `length` only when it had more to say: one word more than tokens.
UNPACED = Load(64, 64, stream=True, seed="layers", prompt_tokens=513, output_tokens=512)
PACED = replace(UNPACED, prompt_tokens=129, output_tokens=128)
ONE_TOKEN = replace(UNPACED, prompt_tokens=64, output_tokens=1)


def build_echo_app(delay_s: float) -> Any:
    """Our ASGI app over the echo engine. All that is known of serve's inside is in here."""
    from packhorse.serve.engines.echo import EchoEngine
    from packhorse.serve.models import Model, Models
    from packhorse.serve.pipeline import Pipeline
    from packhorse.serve.rest.app import build_app
    from packhorse.serve.settings.engine import EngineSettings
    from packhorse.serve.settings.http import HttpSettings

    model = Model(MODEL)
    model.attach(EchoEngine(EngineSettings(kind="echo", echo_delay_s=delay_s)))
    return build_app(Pipeline(Models(model)), HttpSettings())


async def call(app: Any, path: str, body: bytes) -> list[bytes]:
    """One POST to the app. Returns the parts of the answer's body; raises LoadError unless 200."""
    asked = False
    parts: list[bytes] = []
    status = 0

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()  # the client stays: cancelled when the answer has ended
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.body":
            parts.append(message["body"])
        else:
            status = message["status"]

    headers = [(b"host", b"bench"), (b"content-type", b"application/json")]
    headers.append((b"content-length", str(len(body)).encode()))
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": "POST", "scheme": "http", "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "headers": headers, "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    if status != 200:
        raise LoadError(f"the app answered {status}: {b''.join(parts)[:4000]!r}")
    return parts


async def cpu_of_all(work: list[Awaitable[Any]]) -> tuple[float, list[Any]]:
    """CPU seconds of this process for doing it all at once, and the results."""
    started_s = time.process_time()
    results = await asyncio.gather(*work)
    return time.process_time() - started_s, results


async def in_process_us(load: Load, delay_s: float) -> float:
    """CPU microseconds per token, all of the load at once; one event a token is verified."""
    app = build_echo_app(delay_s)
    path = path_of(load.kind)
    requests = [json.dumps(body).encode() for body in bodies(load, MODEL)]
    await call(app, path, requests[0])
    rounds_us = []
    for _ in range(ROUNDS):
        cpu_s, answers = await cpu_of_all([call(app, path, body) for body in requests])
        rounds_us.append(cpu_s / load.tokens * 1e6)
        for parts in answers:
            whole = b"".join(parts)
            events = whole.count(b"data: ") - whole.count(b"data: [DONE]")
            if events != load.output_tokens or b'"error"' in whole:
                raise LoadError(f"{events} events, {load.output_tokens} tokens: {whole[-2000:]!r}")
    return statistics.median(rounds_us)


async def sleeping_us(load: Load, delay_s: float) -> float:
    """CPU microseconds per sleep, of as many tasks with as many sleeps as the load has."""

    async def sleeper() -> None:
        for _ in range(load.output_tokens):
            await asyncio.sleep(delay_s)

    rounds_us = []
    for _ in range(ROUNDS):
        cpu_s, _ = await cpu_of_all([sleeper() for _ in range(load.requests)])
        rounds_us.append(cpu_s / load.tokens * 1e6)
    return statistics.median(rounds_us)


def over_socket(load: Load, delay_s: float, work_folder: Path) -> dict[str, float]:
    """The same through `packhorse serve`: the server's CPU and the client's."""
    rounds: list[dict[str, float]] = []
    several = replace(load, requests=load.requests * 4)  # for the 10 ms of the server's CPU clock
    with echo(work_folder, delay_s=delay_s) as server:
        run_cell(server.target, load, server.cpu)
        for _ in range(ROUNDS):
            cell, (before, after) = run_cell(server.target, several, server.cpu)
            if cell["events_per_token"] != 1:
                raise LoadError(f"not one event a token but {cell['events_per_token']}")
            rounds.append({**cell, **before.per_token_us(after, several.tokens)})
    return {
        name: statistics.median(some[name] for some in rounds)
        for name in ("api_cpu_us_per_token", "client_cpu_us_per_token", "tokens_per_s")
    }


def layers(work_folder: Path) -> dict[str, Any]:
    """All four runs, and what one request costs apart from its tokens. Raises LoadError."""
    result: dict[str, Any] = {}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for name, load, delay_s in (("unpaced", UNPACED, 0.0), ("paced", PACED, PACE_S)):
            progress(f"layers: {name}, in process and over a socket")
            app_us = runner.run(in_process_us(load, delay_s))
            sleeps_us = runner.run(sleeping_us(load, delay_s)) if delay_s else 0.0
            socket = over_socket(load, delay_s, work_folder)
            server_us = socket["api_cpu_us_per_token"]
            result[name] = {
                "streams": load.concurrency,
                "tokens_per_stream": load.output_tokens,
                "in_process_us_per_token": app_us,
                "sleeps_us_per_token": sleeps_us,
                "server_us_per_token": server_us,
                "uvicorn_and_socket_us_per_token": server_us - app_us,
                "client_us_per_token": socket["client_cpu_us_per_token"],
                "tokens_per_s": socket["tokens_per_s"],
            }
        result["in_process_us_per_request_of_one_token"] = runner.run(in_process_us(ONE_TOKEN, 0.0))
    result["goal_us"] = GOAL_US
    result["met"] = result["unpaced"]["in_process_us_per_token"] <= GOAL_US
    return result


def api_bodies(words: str, tokens: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """API -> its path and a body: the same streamed request over each."""
    messages = [{"role": "user", "content": words}]
    common = {"model": MODEL, "stream": True}
    return {
        "chat": ("/v1/chat/completions", {**common, "messages": messages, "max_tokens": tokens}),
        "responses": ("/v1/responses", {**common, "input": words, "max_output_tokens": tokens}),
        "messages": ("/v1/messages", {**common, "messages": messages, "max_tokens": tokens}),
    }


async def apis_us(streams: int = 64, tokens: int = 512, rounds: int = 9) -> dict[str, Any]:
    """CPU microseconds per streamed token over each API, in process, and what each costs of chat's:
    the median of rounds in which they take turns. Raises LoadError.
    """
    app = build_echo_app(0.0)
    words = " ".join(f"word{number}" for number in range(tokens + 1))
    asked = {
        name: (path, json.dumps(body).encode())
        for name, (path, body) in api_bodies(words, tokens).items()
    }
    costs: dict[str, list[float]] = {name: [] for name in asked}
    for number in range(rounds + 1):
        for name, (path, body) in asked.items():
            cpu_s, answers = await cpu_of_all([call(app, path, body) for _ in range(streams)])
            if number:  # the first round warms up
                costs[name].append(cpu_s / streams / tokens * 1e6)
            told = b"".join(answers[0])
            if told.count(b"word") < tokens:
                raise LoadError(f"not {tokens} words: {told[-2000:]!r}")
    return {
        name: {
            "in_process_us_per_token": statistics.median(us),
            "of_chat": statistics.median(
                one / chat for one, chat in zip(us, costs["chat"], strict=True)
            ),
        }
        for name, us in costs.items()
    }


def apis_report(result: dict[str, Any]) -> str:
    lines = [f"{'CPU us per streamed token':26}{'in process':>20}{'of chat':>20}"]
    lines += [
        f"{name:26}{found['in_process_us_per_token']:20.2f}{found['of_chat']:20.2f}"
        for name, found in result.items()
    ]
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """The layers for people."""
    columns = ("in_process", "sleeps", "server", "uvicorn_and_socket")
    titles = ("in process", "of it sleeps", "server", "uvicorn and socket")
    lines = [f"{'CPU us per streamed token':26}" + "".join(f"{title:>20}" for title in titles)]
    for name in ("unpaced", "paced"):
        values = [result[name][f"{column}_us_per_token"] for column in columns]
        lines.append(f"{name:26}" + "".join(f"{value:20.1f}" for value in values))
    request_us = result["in_process_us_per_request_of_one_token"]
    met = "met" if result["met"] else "NOT met"
    lines.append(f"in process, a request of one token (64 of prompt): {request_us:.0f} us")
    lines.append(f"goal, in process and unpaced: <= {result['goal_us']:.0f} us: {met}")
    return "\n".join(lines)
