"""Load on a server: what one cell of it is, and `run_cell`, which has a client process run it.

The client is bench/load_client.py. Between it and this process goes: the job on stdin, `ready`, an
empty line, the result as one line of JSON; the server's CPU is read on both sides of that. The
client ends, and with it its connections, when its stdin is closed.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

CLIENT = Path(__file__).resolve().parent / "load_client.py"
RPC_CLIENT = CLIENT.with_name("grpc_client.py")
Kind = Literal["ids", "text", "chat", "responses", "messages"]


class LoadError(Exception):
    """The load could not be run to its end; the message has what the server said."""


@dataclass(frozen=True)
class Load:
    """One cell: how many requests, how many at a time, of what size."""

    requests: int
    concurrency: int
    stream: bool
    seed: str
    """Different seeds share no prompt; equal ones make equal prompts on every machine."""
    prompt_tokens: int = 64
    output_tokens: int = 64
    kind: Kind = "ids"
    timeout_s: float = 300.0
    rate_per_s: float | None = None
    """Requests arrive at random at this rate, whether others have ended or not; `concurrency` is
    then the most connections, and an answer may be 429 with Retry-After.
    """
    models: tuple[str, ...] = ()
    """Asked for in turn, instead of the target's own."""
    zipf: float | None = None
    """Natural repetition: prompts are drawn from `distinct`, the k-th likeliest with a probability
    proportional to k ** -zipf. None: all are different.
    """
    distinct: int = 1000

    @property
    def tokens(self) -> int:
        return self.requests * self.output_tokens


@dataclass(frozen=True)
class Target:
    """Who gets it. `url` has no path: http://127.0.0.1:8000."""

    url: str
    model: str


def token_prompts(load: Load) -> list[list[int]]:
    """Token ids, `prompt_tokens` each, all prompts different unless the load is to repeat some. Ids
    are between 100 and 2000, which all but toy vocabularies have.
    """
    chooser = random.Random(load.seed)
    prompts = [
        [chooser.randrange(100, 2000) for _ in range(load.prompt_tokens)]
        for _ in range(load.requests if load.zipf is None else load.distinct)
    ]
    if load.zipf is None:
        return prompts
    weights = [rank**-load.zipf for rank in range(1, load.distinct + 1)]
    return chooser.choices(prompts, weights, k=load.requests)


def bodies(load: Load, model: str) -> list[dict[str, Any]]:
    """The requests' JSON. As text and in chats a prompt is that many words, not tokens."""
    models = load.models or (model,)
    most = "max_output_tokens" if load.kind == "responses" else "max_tokens"
    common: dict[str, Any] = {
        most: load.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": load.stream,
    }
    found: list[dict[str, Any]] = []
    for number, ids in enumerate(token_prompts(load)):
        common["model"] = models[number % len(models)]
        words = " ".join(map(str, ids))
        match load.kind:
            case "ids":
                found.append({**common, "prompt": ids})
            case "text":
                found.append({**common, "prompt": words})
            case "chat" | "messages":
                found.append({**common, "messages": [{"role": "user", "content": words}]})
            case "responses":
                found.append({**common, "input": words, "store": False})
    return found


def path_of(kind: Kind) -> str:
    paths = {
        "chat": "/v1/chat/completions",
        "responses": "/v1/responses",
        "messages": "/v1/messages",
    }
    return paths.get(kind, "/v1/completions")


def run_cell(
    target: Target,
    load: Load,
    reading: Callable[[], Any],
    *,
    rpc: dict[str, str] | None = None,
) -> tuple[dict[str, Any], Any]:
    """Run one cell in a client process. Returns its result and (before, after) of `reading`, which
    is called while the client is connected and nothing is in flight. With `rpc`, address and model,
    it goes over gRPC. Raises LoadError.
    """
    command = [sys.executable, str(RPC_CLIENT if rpc else CLIENT)]
    job = json.dumps({"target": asdict(target), "load": asdict(load), **(rpc or {})})
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None

        def answer() -> Any:
            line = client.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise LoadError(f"the client process ended with {client.wait()}")
            document = json.loads(line)
            if "error" in document:
                raise LoadError(f"{target.url}, {load}: {document['error']}")
            return document

        try:
            print(job, file=client.stdin, flush=True)
            answer()
            time.sleep(0.2)  # the server's work of accepting is no part of the cell
            before = reading()
            print(file=client.stdin, flush=True)
            result = answer()
            time.sleep(0.2)  # nor shall what a request's end leaves to do be missed
            return result, (before, reading())
        finally:
            with contextlib.suppress(BrokenPipeError):
                client.stdin.close()
