"""CPU per streamed token of Chat, Responses and Messages, ours beside plain vLLM's. Ends in one
line of JSON.

    python bench/apis.py          # about 8 minutes: three pairs of servers

64 connections stream answers of 64 tokens from a small random model, which says no end of sequence
(plain vLLM's Messages cannot be told to ignore one); the three APIs take turns on each server, and
servers take turns. CPU is utime + stime of the API process per token. Responses are not stored
(`store: false`); ours keeps its defaults otherwise. Goals: 1.4 of our own chat, and half of plain
vLLM's for the same API.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_models import random_llama
from ladder import progress
from load import Kind, Load, LoadError, bodies, path_of, run_cell
from servers import DTYPE, Server, packhorse, plain_vllm

APIS: tuple[Kind, ...] = ("chat", "responses", "messages")
OF_CHAT, OF_VLLM = 1.4, 0.5


def load_of(kind: Kind, seed: str, requests: int) -> Load:
    return Load(
        requests, 64, stream=True, seed=f"{seed}/{kind}", prompt_tokens=16, kind=kind
    )  # fmt: skip


def check(server: Server, kind: Kind) -> None:
    """One whole answer: has it as many tokens as streams are taken to have? Raises LoadError."""
    load = replace(load_of(kind, "check", 1), stream=False)
    (body,) = bodies(load, server.target.model)
    request = urllib.request.Request(
        server.target.url + path_of(kind),
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        usage = json.load(response)["usage"]
    tokens = usage.get("completion_tokens", usage.get("output_tokens"))
    if tokens != load.output_tokens:
        raise LoadError(f"{kind}: {load.output_tokens} tokens were asked for: {usage}")


def costs(server: Server, seed: str, rounds: int, requests: int) -> dict[str, list[float]]:
    """CPU microseconds per streamed token, of each API in each round. Raises LoadError."""
    for kind in APIS:
        check(server, kind)
        run_cell(server.target, load_of(kind, f"{seed}/warm-up", 64), server.cpu)
    found: dict[str, list[float]] = {kind: [] for kind in APIS}
    for number in range(rounds):
        for kind in APIS:
            load = load_of(kind, f"{seed}/{number}", requests)
            _, (before, after) = run_cell(server.target, load, server.cpu)
            cost = before.per_token_us(after, load.tokens)["api_cpu_us_per_token"]
            found[kind].append(cost)
            progress(f"  {kind:10} {cost:7.1f} us per token")
    return found


def measure(model: Path, work_folder: Path, pairs: int, rounds: int, requests: int) -> Any:
    """Raises LoadError."""
    starts = {
        "packhorse": lambda: packhorse(model, work_folder),
        "vllm": lambda: plain_vllm(model, work_folder, ("--dtype", DTYPE)),
    }
    all_costs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in starts}
    for pair in range(pairs):
        names = list(starts) if pair % 2 == 0 else list(starts)[::-1]
        for name in names:
            progress(f"pair {pair + 1}: {name}")
            with starts[name]() as server:
                all_costs[name].append(costs(server, str(pair), rounds, requests))

    def us(name: str, pair: int, kind: str) -> float:
        return statistics.median(all_costs[name][pair][kind])

    result: dict[str, Any] = {}
    for kind in APIS:
        own = [us("packhorse", pair, kind) for pair in range(pairs)]
        theirs = [us("vllm", pair, kind) for pair in range(pairs)]
        chat = [us("packhorse", pair, "chat") for pair in range(pairs)]
        result[kind] = {
            "packhorse_us": own,
            "vllm_us": theirs,
            "of_own_chat": [one / its for one, its in zip(own, chat, strict=True)],
            "of_vllm": [one / its for one, its in zip(own, theirs, strict=True)],
        }
    return result


def report(result: Any) -> str:
    lines = [f"{'CPU us per token':18}{'ours':>8}{'vLLM':>8}{'of our chat':>24}{'of vLLM':>24}"]
    for kind, found in result.items():
        cells = [statistics.median(found[name]) for name in ("packhorse_us", "vllm_us")]
        ratios = [
            f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for values in (found["of_own_chat"], found["of_vllm"])
        ]
        lines.append(
            f"{kind:18}{cells[0]:8.1f}{cells[1]:8.1f}{ratios[0]:>24}{ratios[1]:>24}"
        )  # fmt: skip
    lines.append(f"goals: at most {OF_CHAT} of our chat, {OF_VLLM} of vLLM's")
    return "\n".join(lines)


def main() -> None:
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a chat model [default: a random one]")
    parser.add_argument("--pairs", type=int, default=3, help="[default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[default: %(default)s]")
    parser.add_argument("--requests", type=int, default=192, help="[default: %(default)s]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work_folder = Path(folder)
        model = given.model or random_llama(
            work_folder / "llama", hidden=256, layers=2, intermediate=768
        )
        try:
            found = measure(model, work_folder, given.pairs, given.rounds, given.requests)
        except LoadError as error:
            sys.exit(str(error))
    print(report(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
