"""What the result cache is worth, and what it costs. Ends in one line of JSON.

    python bench/cache_load.py                  # about 20 minutes on two cores
    python bench/cache_load.py --only hits,miss

Parts:

- zipf: 5,000 requests of 64 prompt and 64 output tokens, temperature 0, drawn from 1,000 prompts
  (the k-th likeliest with a probability proportional to 1/k), by 32 callers, on the random model of
  25 million parameters: ours with a cold cache, and plain vLLM, in alternate runs.
- hits: prompts that are all in the cache: the server's CPU, latency and rate at 32 connections, of
  plain completions (token ids) and of chats of a usual length, streamed and not.
- miss: the CPU that the cache adds to a request that is in none: the whole way in this process, on
  the echo engine, with and without it; and what a streamed token costs more.
- store: the same in front of a Redis server that is up, and of one that is dead.

The client is bench/load_client.py, in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvloop
from bench_models import random_llama
from layers import call, cpu_of_all
from load import Load, bodies, path_of, run_cell
from servers import DTYPE, ENGINE, MODEL, free_port, packhorse_with, plain_vllm

PARTS = ("zipf", "hits", "miss", "store")
ZIPF = Load(5000, 32, stream=False, seed="zipf", zipf=1.0, timeout_s=1800)
CACHED: dict[str, Any] = {"engine": {**ENGINE, "dtype": DTYPE}, "cache": {"enabled": True}}
ROUNDS = 7


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def counters(url: str, *names: str) -> dict[str, float]:
    """Sums over the labels of some series."""
    text = httpx.get(url + "/metrics", timeout=30).text
    found = dict.fromkeys(names, 0.0)
    for line in text.splitlines():
        for name in names:
            if line.startswith((name + " ", name + "{")):
                found[name] += float(line.rpartition(" ")[2])
    return found


def zipf(folder: Path, work_folder: Path, pairs: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"ours": [], "plain vLLM": []}
    marks: dict[str, float] = {}
    for number in range(pairs):
        load = replace(ZIPF, seed=f"zipf {number}")
        warm = Load(64, 32, stream=False, seed="warm-up")
        with packhorse_with(folder, work_folder, CACHED) as server:
            run_cell(server.target, warm, lambda: 0)
            cell, _ = run_cell(server.target, load, lambda: 0)
            rates["ours"].append(cell["requests_per_s"])
            marks = counters(
                server.target.url,
                "packhorse_cache_lookups_total",
                "packhorse_cache_coalesced_total",
                "packhorse_cache_saved_tokens_total",
                "vllm:generation_tokens_total",
            )
        say(f"zipf, ours: {rates['ours'][-1]:.1f} requests/s, {marks}")
        with plain_vllm(folder, work_folder, ["--dtype", DTYPE]) as server:
            run_cell(server.target, warm, lambda: 0)
            cell, _ = run_cell(server.target, load, lambda: 0)
            rates["plain vLLM"].append(cell["requests_per_s"])
        say(f"zipf, plain vLLM: {rates['plain vLLM'][-1]:.1f} requests/s")
    ratios = [ours / plain for ours, plain in zip(*rates.values(), strict=True)]
    return {
        **{f"{name}, requests/s": values for name, values in rates.items()},
        "ratios": ratios,
        "counters": marks,
        "dtype": DTYPE,
        "goal": "at least 4",
        "met": min(ratios) >= 4,
    }


def hits(folder: Path, work_folder: Path, cache: dict[str, Any]) -> dict[str, Any]:
    """A first run fills the cache, the second has nothing but hits."""
    found: dict[str, Any] = {}
    with packhorse_with(folder, work_folder, {**CACHED, "cache": cache}) as server:
        for kind, tokens in (("ids", 64), ("chat", 30)):
            for stream in (False, True):
                fill = Load(32, 32, stream=False, seed=kind, prompt_tokens=tokens, kind=kind)
                run_cell(server.target, fill, lambda: 0)
                # Few prompts, asked again and again.
                load = replace(fill, requests=6000, stream=stream, zipf=0.0, distinct=32)
                before = counters(server.target.url, "vllm:generation_tokens_total")
                cells = [run_cell(server.target, load, server.cpu) for _ in range(3)]
                if before != counters(server.target.url, "vllm:generation_tokens_total"):
                    raise SystemExit("some of what should be hits were generated")
                cpu_ms = [
                    (after.api_s - first.api_s) / load.requests * 1e3 for _, (first, after) in cells
                ]
                name = f"{kind}, {'streamed' if stream else 'whole'}"
                found[name] = {
                    "server_cpu_ms_per_hit": round(statistics.median(cpu_ms), 3),
                    "hits_per_s": round(statistics.median(c["requests_per_s"] for c, _ in cells)),
                    "latency_ms": cells[-1][0]["latency_ms"],
                }
                say(f"hits, {name}: {found[name]}")
    return found


def build_app(*, cached: bool) -> Any:
    """Our ASGI app over the echo engine."""
    from packhorse.serve.cache.result_cache import ResultCache
    from packhorse.serve.engines.echo import EchoEngine
    from packhorse.serve.models import Model, Models
    from packhorse.serve.pipeline import Pipeline
    from packhorse.serve.rest.app import build_app as build
    from packhorse.serve.settings.engine import EngineSettings
    from packhorse.serve.settings.http import HttpSettings

    cache = None
    if cached:
        cache = ResultCache(b"s" * 32, memory_bytes=2**28, max_entry_bytes=2**20, ttl_s=600)
        cache.fingerprint = b"echo"
    model = Model(MODEL, cache=cache)
    model.attach(EchoEngine(EngineSettings(kind="echo")))
    return build(Pipeline(Models(model)), HttpSettings())


async def before_the_engine_us() -> float:
    """CPU that the cache takes of a request that it does not have, until the engine may begin: best
    of several rounds.
    """
    from packhorse.serve.cache.result_cache import ResultCache
    from packhorse.serve.messages import EffectiveSampling, GenerateRequest, Prompt, Route, Sampling
    from packhorse.serve.tenancy import Tenancy

    tenancy = Tenancy(b"s" * 32)
    cache = ResultCache(b"s" * 32, memory_bytes=2**26, max_entry_bytes=2**20, ttl_s=600)
    cache.fingerprint, route, number = b"m" * 32, Route(MODEL), 2000
    asked = [
        (
            GenerateRequest(
                "id",
                MODEL,
                Sampling(temperature=0.0),
                messages=({"role": "user", "content": f"{n}"},),
            ),
            Prompt(
                tuple(range(n, n + 80)),
                64,
                effective_sampling=EffectiveSampling(temperature=0.0),
                is_lasting=True,
            ),
        )
        for n in range(number)
    ]
    rounds_us = []
    for _ in range(ROUNDS):
        started_s = time.process_time()
        flights = []
        for request, prompt in asked:
            tenancy.prefix_cache_salt(request.caller.tenant, request.cache_salt)
            if not cache.concerns(request):
                raise SystemExit("the cache should be concerned")
            cache.known(request)
            key = cache.key(request, route, cache.learn(request, prompt))
            assert key is not None
            cache.flight(key)
            cache.recall(key, request)
            flights.append(cache.lead(key))
        rounds_us.append((time.process_time() - started_s) / number * 1e6)
        for flight in flights:
            flight.settle(())
    return min(rounds_us)


def miss() -> dict[str, Any]:
    """CPU per request and per token of the whole way, in turn with and without the cache."""
    long = Load(64, 64, stream=True, seed="", prompt_tokens=513, output_tokens=512)
    loads = {
        "whole": Load(250, 32, stream=False, seed="", prompt_tokens=64, output_tokens=64),
        "streamed": long,
    }
    found: dict[str, Any] = {}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for name, load in loads.items():
            costs: dict[bool, list[float]] = {False: [], True: []}
            for number in range(ROUNDS):
                for cached in (False, True):
                    app = build_app(cached=cached)
                    several = replace(load, seed=f"{name} {number}")
                    sent = [json.dumps(body).encode() for body in bodies(several, MODEL)]

                    async def run(app: Any = app, sent: list[bytes] = sent) -> float:
                        await call(app, path_of("ids"), sent[-1])
                        work = [call(app, path_of("ids"), body) for body in sent[:-1]]
                        return (await cpu_of_all(work))[0]

                    costs[cached].append(runner.run(run()) / (len(sent) - 1) * 1e6)
            without, with_it = (statistics.median(costs[cached]) for cached in (False, True))
            found[name] = {
                "us_per_request_without": round(without),
                "us_per_request_with": round(with_it),
                "added_us_per_request": round(with_it - without),
            }
            if load.stream:
                found[name]["added_us_per_token"] = round(
                    (with_it - without) / load.output_tokens, 2
                )
            say(f"miss, {name}: {found[name]}")
    found["before_the_engine_us"] = round(asyncio.run(before_the_engine_us()), 1)
    found["goal"] = "at most 150 us added before the engine"
    found["met"] = found["before_the_engine_us"] <= 150
    return found


@contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("there is no redis-server; install Debian's")
    port = free_port()
    process = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        time.sleep(1)
        yield f"redis://127.0.0.1:{port}/0", process
    finally:
        process.kill()
        process.wait()


def store(folder: Path, work_folder: Path) -> dict[str, Any]:
    """Misses and hits with a store: latency of short requests while it is up, paused and dead."""
    found: dict[str, Any] = {}
    short = Load(2000, 4, stream=False, seed="", prompt_tokens=16, output_tokens=1)
    with redis_server(work_folder) as (url, process):
        cache = {"enabled": True, "store": url, "secret": "s" * 32, "memory_bytes": 0}
        settings = {**CACHED, "cache": {"enabled": False}}
        with packhorse_with(folder, work_folder, settings) as server:
            run_cell(server.target, replace(short, seed="warm-up"), lambda: 0)
            cell, _ = run_cell(server.target, replace(short, seed="none"), lambda: 0)
            found["no cache"] = cell["latency_ms"]
        with packhorse_with(folder, work_folder, {**CACHED, "cache": cache}) as server:
            run_cell(server.target, replace(short, seed="warm-up"), lambda: 0)
            for name in ("up, misses", "up, hits", "dead", "dead again"):
                if name == "dead":
                    process.kill()
                    process.wait()
                    time.sleep(2)
                seed = "up, misses" if name == "up, hits" else name
                cell, _ = run_cell(server.target, replace(short, seed=seed), lambda: 0)
                found[name] = cell["latency_ms"]
                say(f"store, {name}: {cell['latency_ms']}")
    return found


def main() -> None:
    about, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"parts, of {','.join(PARTS)} [default: all]")
    parser.add_argument("--pairs", type=int, default=2, help="of zipf [default: %(default)s]")
    given = parser.parse_args()
    parts = given.only.split(",") if given.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: there is no part {unknown.pop()!r}")
    result: dict[str, Any] = {"bench": "cache_load"}
    with tempfile.TemporaryDirectory() as scratch:
        work_folder = Path(scratch)
        folder = random_llama(work_folder / "llama-25m")
        if "miss" in parts:
            result["miss"] = miss()
        if "hits" in parts:
            result["hits"] = hits(folder, work_folder, {"enabled": True})
        if "store" in parts:
            result["store"] = store(folder, work_folder)
        if "zipf" in parts:
            result["zipf"] = zipf(folder, work_folder, given.pairs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
