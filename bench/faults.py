"""How the server bears what goes wrong: its engine killed, more load than it can take, both for
long. Ends in one line of JSON.

    python bench/faults.py                          # about 10 minutes
    python bench/faults.py --soak-minutes 20        # as `make bench` does

Five parts, each on a server of its own over the demo model, on loopback:

- kills: under 32 clients (half of them stream), SIGKILL and SIGSTOP to an engine of one process,
  then to the worker and the core of one that has both. What was lost, how long until ready, and
  how long /health/live takes meanwhile, asked ten times a second.
- poison: three clients with a prompt each that ends the engine ask ten times each, under its usual
  limit of five failures, and eight others beside them (bench/poison.py).
- leave: all of 32 clients leave, again and again; how long until the engine works on nothing.
- overload: the latency of whole answers at capacity (as many clients as the engine has places),
  before and after requests arrive at ten times that rate for --overload-seconds (by the cheap
  client, bench/load_client.py).
- soak: steady mixed load (whole, streams, clients that leave, malformed bodies) with three kills
  spread over it; the server's memory, file descriptors, threads, processes and tasks once a second.

The client runs in this process and shares the CPUs with the server: times are upper bounds.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from load import Load, run_cell
from poison import poison
from servers import packhorse_with

DEMO = Path(__file__).resolve().parent.parent / "demo"
SEATS = 32
TOKENS = 100
LONG = 1000  # tokens that are still being written when the fault comes
PATH = "/v1/completions"
PARTS = ("kills", "poison", "leave", "overload", "soak")
MALFORMED = (b"{", b"[]", b'{"model": "bench", "prompt": -1}', b'{"model": "x", "prompt": "a"}')


@dataclass
class Tally:
    """What clients got."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    live_s: list[float] = field(default_factory=list)


class Clients:
    """Asks one server, and counts."""

    def __init__(self, url: str, pid: int) -> None:
        self.pid = pid
        self.tally = Tally()
        self.tokens = TOKENS
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=300, limits=limits)

    def body(self, **fields: Any) -> dict[str, Any]:
        asked = {"model": "bench", "prompt": "The", "max_tokens": self.tokens, "ignore_eos": True}
        return {**asked, **fields}

    async def whole(self) -> None:
        try:
            response = await self.http.post(PATH, json=self.body())
        except httpx.TransportError as error:
            self.tally.statuses[type(error).__name__] += 1
            return
        self.tally.statuses[str(response.status_code)] += 1
        if response.status_code == 200:
            if response.json()["usage"]["completion_tokens"] != self.tokens:
                self.tally.statuses["cut short"] += 1
        elif response.status_code == 429:
            await asyncio.sleep(0.05)

    async def stream(self, *, leave: bool = False) -> None:
        async with self.http.stream("POST", PATH, json=self.body(stream=True)) as response:
            if response.status_code != 200:
                self.tally.statuses[str(response.status_code)] += 1
                await asyncio.sleep(0.05)
                return
            last = b""
            async for part in response.aiter_bytes():
                if leave:
                    self.tally.statuses["left"] += 1
                    return
                last = (last + part)[-2000:]
        if b'"error"' in last:
            self.tally.statuses["stream, ended with an error event"] += 1
        elif last.endswith(b"data: [DONE]\n\n"):
            self.tally.statuses["stream"] += 1
        else:
            self.tally.statuses["stream, broken off"] += 1

    def take_all_seats(self) -> list[asyncio.Task[None]]:
        """As many requests as the engine has places, half of them streams."""
        return [
            asyncio.create_task(step())
            for step in (self.whole, self.stream)
            for _ in range(SEATS // 2)
        ]

    async def malformed(self) -> None:
        response = await self.http.post(PATH, content=random.choice(MALFORMED))
        self.tally.statuses[f"malformed: {response.status_code}"] += 1

    async def probe(self) -> None:
        """For ever: liveness, ten times a second, on a connection of its own."""
        async with httpx.AsyncClient(base_url=self.http.base_url, timeout=60) as http:
            while True:
                started_s = time.perf_counter()
                (await http.get("/health/live")).raise_for_status()
                self.tally.live_s.append(time.perf_counter() - started_s)
                await asyncio.sleep(0.1)

    async def until_ready(self, wanted: int = 200) -> float:
        started_s = time.perf_counter()
        while (await self.http.get("/health/ready")).status_code != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return time.perf_counter() - started_s

    def engine(self, name: str) -> psutil.Process:
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"VLLM::{name}" in " ".join(process.cmdline()):
                    return process
        raise SystemExit(f"the server has no process {name}")

    async def metric(self, name: str) -> float:
        text = (await self.http.get("/metrics")).text
        found = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in found)


@contextlib.asynccontextmanager
async def server(work_folder: Path, **sections: dict[str, Any]) -> AsyncIterator[Clients]:
    engine = {"max_num_seqs": SEATS, **sections.pop("engine", {})}
    with packhorse_with(DEMO / "model", work_folder, {"engine": engine, **sections}) as running:
        assert running.api_pid is not None
        clients = Clients(running.target.url, running.api_pid)
        probing = asyncio.create_task(clients.probe())
        try:
            yield clients
        finally:
            probing.cancel()
            await clients.http.aclose()


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def kills(work_folder: Path, *, own_worker: bool) -> dict[str, Any]:
    results = {}
    limits = {"max_restarts": 100}
    engine: dict[str, Any] = {"stall_timeout_s": 5}
    faults = [("EngineCore", signal.SIGKILL), ("EngineCore", signal.SIGSTOP)]
    if own_worker:
        engine["distributed_executor_backend"] = "mp"
        faults = [
            ("Worker", signal.SIGKILL), ("EngineCore", signal.SIGKILL), ("Worker", signal.SIGSTOP),
        ]  # fmt: skip
    async with server(work_folder, supervisor=limits, engine=engine) as clients:
        for victim, fault in faults:
            clients.tally, clients.tokens = Tally(), LONG
            tasks = clients.take_all_seats()
            while await clients.metric("packhorse_requests_in_flight") < SEATS:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            clients.tally.live_s.clear()
            clients.engine(victim).send_signal(fault)
            noticed_s = await clients.until_ready(503)
            ready_s = noticed_s + await clients.until_ready()
            live_s = list(clients.tally.live_s)
            await asyncio.gather(*tasks)
            name = f"{fault.name} {victim}"
            results[name] = {
                "noticed_s": round(noticed_s, 2),
                "ready_s": round(ready_s, 1),
                "answers": dict(clients.tally.statuses),
                "live_probes": len(live_s),
                "live_p50_s": percentile(live_s, 0.5),
                "live_p99_s": percentile(live_s, 0.99),
                "live_max_s": round(max(live_s), 4),
            }
            say(f"{name}: {json.dumps(results[name])}")
    return results


async def leave(work_folder: Path, times: int = 20) -> dict[str, Any]:
    left_s = []
    async with server(work_folder) as clients:
        clients.tokens = LONG
        for _ in range(times):
            tasks = clients.take_all_seats()
            while await clients.metric("vllm:num_requests_running{") < SEATS:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            started_s = time.perf_counter()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while await clients.metric("vllm:num_requests_running{"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            left_s.append(time.perf_counter() - started_s)
    return {
        "times": times,
        "clients": SEATS,
        "until_nothing_runs_p50_s": round(statistics.median(left_s), 3),
        "until_nothing_runs_max_s": round(max(left_s), 3),
    }


def overload(work_folder: Path, seconds: float) -> dict[str, Any]:
    """Capacity is what as many clients as there are places get; then ten times that arrives."""
    settings = {"engine": {"max_num_seqs": SEATS}}
    with packhorse_with(DEMO / "model", work_folder, settings) as running:
        assert running.api_pid is not None
        memory = psutil.Process(running.api_pid).memory_info

        def cell(seed: str, requests: int, **fields: Any) -> dict[str, Any]:
            load = Load(
                requests, fields.pop("concurrency", SEATS), stream=False, seed=seed,
                prompt_tokens=4, output_tokens=TOKENS, timeout_s=3600, **fields,
            )  # fmt: skip
            result, (before, after) = run_cell(running.target, load, lambda: memory().rss)
            kept = ("wall_s", "requests_per_s", "latency_ms", "answered", "refused", "refusal_ms",
                    "not_sent", "client_cpu_us_per_token")  # fmt: skip
            found = {name: result[name] for name in kept if name in result}
            say(f"{seed}: {json.dumps(found)}")
            return {**found, "rss_growth": round(after / before - 1, 4)}

        warm = cell("warm-up", 10 * SEATS)
        at_capacity = [cell("capacity", int(warm["requests_per_s"] * 30))]
        rate = 10 * at_capacity[0]["requests_per_s"]
        flooded = cell("10x", int(rate * seconds), concurrency=20 * SEATS, rate_per_s=rate)
        # Again, because this machine's speed changes.
        at_capacity.append(cell("capacity again", int(warm["requests_per_s"] * 30)))
    p99_ms = statistics.fmean(result["latency_ms"]["p99"] for result in at_capacity)
    return {
        "capacity": at_capacity,
        "10x": flooded,
        "p99_10x_over_capacity": round(flooded["latency_ms"]["p99"] / p99_ms, 2),
    }


async def soak(work_folder: Path, minutes: float) -> dict[str, Any]:
    samples: list[dict[str, float]] = []
    async with server(work_folder, supervisor={"max_restarts": 100}) as clients:
        process = psutil.Process(clients.pid)
        started_s = time.monotonic()
        ends_s = started_s + minutes * 60

        async def ask(number: int) -> None:
            steps = (
                clients.whole, clients.stream, lambda: clients.stream(leave=True),
                clients.malformed, clients.whole, clients.stream,
            )  # fmt: skip
            step = number
            while time.monotonic() < ends_s:
                await steps[step % len(steps)]()
                step += 1

        async def kill() -> None:
            for quarter in (1, 2, 3):
                await asyncio.sleep(max(0, started_s + quarter * minutes * 15 - time.monotonic()))
                clients.engine("EngineCore").kill()
                await clients.until_ready(503)
                say(f"kill {quarter}: ready after {await clients.until_ready():.0f} s")

        async def sample() -> None:
            while time.monotonic() < ends_s:
                samples.append(
                    {
                        "at_s": time.monotonic() - started_s,
                        "rss_mb": process.memory_info().rss / 2**20,
                        "fds": process.num_fds(),
                        "threads": process.num_threads(),
                        "processes": len(process.children(recursive=True)),
                        "tasks": await clients.metric("packhorse_event_loop_tasks"),
                    }
                )
                await asyncio.sleep(1)

        await asyncio.gather(kill(), sample(), *(ask(number) for number in range(16)))
        await asyncio.sleep(2)
        left = await clients.metric("packhorse_requests_in_flight")
        rebuilt = await clients.metric("packhorse_engine_failures_total")
        answers = dict(clients.tally.statuses)
        live_s = clients.tally.live_s
    return {
        "minutes": minutes,
        "engine_failures": rebuilt,
        "answers": answers,
        "in_flight_at_the_end": left,
        "live_p99_s": percentile(live_s, 0.99),
        # Quarters of the run: each but the first begins with a kill.
        "by_quarter": [_medians(part) for part in _quarters(samples, minutes * 60)],
    }


def _quarters(samples: list[dict[str, float]], length_s: float) -> Iterator[list[dict[str, float]]]:
    """The last half of each quarter: after the rebuild."""
    for number in range(4):
        begin_s, end_s = (number + 0.5) * length_s / 4, (number + 1) * length_s / 4
        yield [sample for sample in samples if begin_s <= sample["at_s"] < end_s]


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: round(statistics.median(sample[name] for sample in samples), 1)
        for name in ("rss_mb", "fds", "threads", "processes", "tasks")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), help="[default: %(default)s]")
    parser.add_argument(
        "--overload-seconds", type=float, default=300, help="[default: %(default)s]"
    )
    parser.add_argument("--soak-minutes", type=float, default=4, help="[default: %(default)s]")
    parser.add_argument("--work-folder", type=Path, help="keeps the servers' logs")
    given = parser.parse_args()
    parts = given.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: no such part: {', '.join(sorted(unknown))}")
    result: dict[str, Any] = {"bench": "faults", "model": "demo", "seats": SEATS}
    with contextlib.ExitStack() as stack:
        folder = given.work_folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if "kills" in parts:
            result["kills"] = {
                "engine of one process": asyncio.run(kills(folder, own_worker=False)),
                "engine with a worker": asyncio.run(kills(folder, own_worker=True)),
            }
        if "poison" in parts:
            result["poison"] = asyncio.run(poison(server, folder))
            say(f"poison: {json.dumps(result['poison'])}")
        if "leave" in parts:
            result["leave"] = asyncio.run(leave(folder))
        if "overload" in parts:
            result["overload"] = overload(folder, given.overload_seconds)
        if "soak" in parts:
            result["soak"] = asyncio.run(soak(folder, given.soak_minutes))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
