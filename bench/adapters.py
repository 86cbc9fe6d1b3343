"""Adapters under load, on the real engine and the demo model. Ends in one line of JSON.

    python bench/adapters.py                # about 15 minutes
    python bench/adapters.py --only replace

Parts:

- replace: `clinic` is replaced by `clinic-v2` and back, 200 times, while 32 clients ask the
  clinic's questions. Answers that are right for neither version, failures, memory before and after.
- fair: 40 adapters through 4 slots, requests at random at 60% of what 4 adapters get: the 95th
  percentile of waiting by adapter; then with one more adapter that brings 80% of all requests.
- load: time to the first token of an adapter that is in the engine, and of one that is not; how
  long other streams' gaps between tokens are while adapters are loaded and while none is.
- train: the same gaps while the routes are trained, which takes a core for seconds, and while they
  are not, in turn.
- mixed: tokens per second of the base alone and of 8 adapters in turn, ours and plain vLLM's, twice
  each, in turn.

The client of all but the last runs in this process and shares the CPUs with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from adapters_server import (
    ADAPTERS,
    CHAT,
    CLIENTS,
    DEMO,
    TEXT,
    copies,
    percentile,
    put,
    resident,
    rss_mb,
    say,
    server,
    streams,
)
from load import Load, run_cell
from servers import ENGINE, Server, packhorse_with, plain_vllm

PARTS = ("replace", "fair", "load", "train", "mixed")


async def replace(work_folder: Path, times: int) -> dict[str, Any]:
    def questions(name: str) -> list[dict[str, str]]:
        lines = (DEMO / f"eval/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if "history" not in json.loads(line)][:100]

    asked = questions("clinic")
    answered: list[tuple[int, str]] = []
    failed: list[str] = []
    async with server(work_folder, None) as (http, pid):

        async def one(number: int) -> str:
            messages = [{"role": "user", "content": asked[number]["prompt"]}]
            body = {
                "model": "clinic", "messages": messages, "temperature": 0, "max_tokens": 64,
                "stream": True,
            }  # fmt: skip
            text = ""
            async with http.stream("POST", CHAT, json=body) as response:
                if response.status_code != 200:
                    failed.append((await response.aread()).decode()[:200])
                    return ""
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            failed.append(line[:200])
                        else:
                            text += event["choices"][0]["delta"].get("content") or ""
            return text

        right = []
        for name in ("clinic", "clinic-v2"):
            await put(http, "clinic", ADAPTERS / name)
            right.append([await one(number) for number in range(len(asked))])
        await put(http, "clinic", ADAPTERS / "clinic")
        done = False

        async def client(offset: int) -> None:
            number = offset
            while not done:
                at = number % len(asked)
                answered.append((at, await one(at)))
                number += 1

        clients = [asyncio.create_task(client(3 * number)) for number in range(CLIENTS)]
        await asyncio.sleep(5)
        before_mb, started_s = rss_mb(pid), time.perf_counter()
        for number in range(times):
            await put(http, "clinic", ADAPTERS / ("clinic-v2", "clinic")[number % 2])
        took_s = time.perf_counter() - started_s
        after_mb = rss_mb(pid)
        done = True
        await asyncio.gather(*clients)
        for _ in range(100):
            if (left := await resident(http)) == 1:
                break
            await asyncio.sleep(0.1)
    neither = sum(got not in (right[0][at], right[1][at]) for at, got in answered)
    return {
        "replacements": times,
        "seconds": round(took_s, 1),
        "answers": len(answered),
        "failed": failed[:5],
        "of_neither_version": neither,
        "of_each_version": [sum(got == version[at] for at, got in answered) for version in right],
        "resident_at_the_end": left,
        "rss_mb": [before_mb, after_mb],
    }


async def fair(work_folder: Path, seconds: float) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=work_folder))
    names = copies(folder, 40)
    rng = random.Random(1)
    async with server(work_folder, folder, max_loras=4) as (http, _):

        async def one(model: str, waits: dict[str, list[float]]) -> None:
            """Time to the first token; most of it is the wait in the adapter queue."""
            body = {
                "model": model, "prompt": "The", "max_tokens": 32, "ignore_eos": True,
                "stream": True,
            }  # fmt: skip
            started_s = time.perf_counter()
            async with http.stream("POST", TEXT, json=body) as response:
                if response.status_code != 200:
                    raise SystemExit((await response.aread()).decode())
                first = True
                async for _ in response.aiter_lines():
                    if first:
                        waits[model].append(time.perf_counter() - started_s)
                        first = False

        async def run(schedule: list[tuple[float, str]]) -> dict[str, list[float]]:
            waits: dict[str, list[float]] = defaultdict(list)
            started_s = time.perf_counter()
            tasks = []
            for at_s, model in schedule:
                await asyncio.sleep(max(0.0, started_s + at_s - time.perf_counter()))
                tasks.append(asyncio.create_task(one(model, waits)))
            await asyncio.gather(*tasks)
            return waits

        def arrivals(rate_per_s: float, models: list[str]) -> list[tuple[float, str]]:
            found, at_s = [], 0.0
            while (at_s := at_s + rng.expovariate(rate_per_s)) < seconds:
                found.append((at_s, rng.choice(models)))
            return found

        # Capacity: 40 at a time, of all adapters in turn.
        started_s = time.perf_counter()
        schedule = [(0.0, names[number % 40]) for number in range(400)]
        await run(schedule)
        capacity = 400 / (time.perf_counter() - started_s)
        say(f"fair: {capacity:.1f} requests/s")
        uniform = await run(arrivals(0.6 * capacity, names))
        # The hot one has 80% of all requests, the others together as many as without it.
        calm = arrivals(0.12 * capacity, names[1:])
        alone = await run(calm)
        hot = arrivals(0.48 * capacity, names[:1])
        beside = await run(sorted(calm + hot))
    each = {name: percentile(values, 0.95) for name, values in uniform.items()}
    pairs = {
        name: (percentile(alone[name], 0.95), percentile(beside[name], 0.95))
        for name in names[1:]
        if alone[name]
    }
    middle = statistics.median(each.values())
    return {
        "capacity_per_s": round(capacity, 1),
        "uniform_p95_s": {"median": middle, "worst": max(each.values())},
        "uniform_worst_over_median": round(max(each.values()) / middle, 2),
        "others_p95_s_without_hot": round(statistics.median(a for a, _ in pairs.values()), 3),
        "others_p95_s_beside_hot": round(statistics.median(b for _, b in pairs.values()), 3),
        "beside_over_without_median": round(statistics.median(b / a for a, b in pairs.values()), 2),
        "beside_over_without_worst": round(max(b / a for a, b in pairs.values()), 2),
        "others_within_2": [sum(b <= 2 * a for a, b in pairs.values()), len(pairs)],
        "beside_over_without_pooled": round(
            percentile([s for name in pairs for s in beside[name]], 0.95)
            / percentile([s for name in pairs for s in alone[name]], 0.95),
            2,
        ),
        "hot_p95_s": percentile(beside[names[0]], 0.95),
    }


async def loading(work_folder: Path) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=work_folder))
    names = copies(folder, 24)
    async with server(work_folder, folder, max_loras=4, max_cpu_loras=5) as (http, _):

        async def first_token_s(model: str) -> float:
            body = {"model": model, "prompt": "The", "max_tokens": 2, "stream": True}
            started_s = time.perf_counter()
            async with http.stream("POST", TEXT, json=body) as response:
                async for _ in response.aiter_lines():
                    return time.perf_counter() - started_s
            raise SystemExit("no answer")

        gaps: list[float] = []

        async def measured(models: list[str]) -> tuple[list[float], list[float]]:
            gaps.clear()
            found = []
            for model in models:
                found.append(await first_token_s(model))
                await asyncio.sleep(0.1)
            return found, list(gaps)

        async with streams(http, gaps):
            await first_token_s(names[0])
            warm, calm_gaps = await measured([names[0]] * 48)
            cold, busy_gaps = await measured(names[1:] * 2 + names[:2])
    return {
        "first_token_s_warm": [percentile(warm, 0.5), percentile(warm, 0.99)],
        "first_token_s_cold": [percentile(cold, 0.5), percentile(cold, 0.99)],
        "others_gap_s_p99_calm": percentile(calm_gaps, 0.99),
        "others_gap_s_p99_while_loading": percentile(busy_gaps, 0.99),
        "ratio": round(percentile(busy_gaps, 0.99) / percentile(calm_gaps, 0.99), 2),
    }


async def training(work_folder: Path, rounds: int = 8) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=work_folder))
    for name in ("clinic", "ledger", "code"):
        shutil.copytree(ADAPTERS / name, folder / name)
    none, routes = work_folder / "none.jsonl", work_folder / "routes.yaml"
    shutil.copyfile(DEMO / "base_examples.jsonl", none)
    routes.write_text(json.dumps({"learned": {"none_examples": str(none)}}))
    gaps: list[float] = []
    calm: list[float] = []
    busy: list[float] = []
    took_s: list[float] = []
    async with server(work_folder, folder, routes=routes) as (http, _), streams(http, gaps):
        for number in range(rounds):
            gaps.clear()
            with none.open("a") as file:  # what was trained before is not trained again
                file.write(json.dumps({"prompt": f"What is {number} and {number}?"}) + "\n")
            started_s = time.perf_counter()
            answer = await http.post("/admin/routes/reload")
            answer.raise_for_status()
            took_s.append(time.perf_counter() - started_s)
            busy += gaps
            gaps.clear()
            await asyncio.sleep(took_s[-1])
            calm += gaps
    found = {
        "trainings": rounds,
        "train_s": round(statistics.median(took_s), 2),
        "gaps": [len(calm), len(busy)],
        "others_gap_s_calm": [percentile(calm, share) for share in (0.5, 0.99)],
        "others_gap_s_while_training": [percentile(busy, share) for share in (0.5, 0.99)],
    }
    return {**found, "ratio_p99": round(percentile(busy, 0.99) / percentile(calm, 0.99), 2)}


def mixed(work_folder: Path) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=work_folder))
    names = copies(folder, 8)
    lora = {"enable_lora": True, "max_loras": 8, "max_cpu_loras": 9, "max_lora_rank": 8}
    paths = [f"{name}={folder / name}" for name in names]
    rates: dict[str, list[float]] = defaultdict(list)

    def measure(whose: str, running: Server) -> None:
        for what, models in (("base", ()), ("8 adapters", tuple(names)), ("base again", ())):
            load = Load(
                256, 32, stream=False, seed=f"{what}", output_tokens=64, models=models,
                timeout_s=600,
            )  # fmt: skip
            result, _ = run_cell(running.target, load, lambda: 0)
            rates[f"{whose}, {what}"].append(result["tokens_per_s"])
            say(f"{whose}, {what}: {result['tokens_per_s']:.0f} tokens/s")

    for _ in range(2):
        settings = {
            "engine": {**ENGINE, **lora},
            "adapters": {"folder": str(folder), "quantum_tokens": 10**9},
        }
        with packhorse_with(DEMO / "model", work_folder, settings) as running:
            measure("ours", running)
        more = ["--enable-lora", "--max-loras", 8, "--max-cpu-loras", 9, "--max-lora-rank", 8,
                "--lora-modules", *paths]  # fmt: skip
        with plain_vllm(DEMO / "model", work_folder, more) as running:
            measure("plain vLLM", running)
    found: dict[str, Any] = {f"{name}, tokens/s": rate for name, rate in rates.items()}
    for whose in ("ours", "plain vLLM"):
        base = statistics.fmean(rates[f"{whose}, base"] + rates[f"{whose}, base again"])
        found[f"{whose}, 8 adapters over base"] = round(
            statistics.fmean(rates[f"{whose}, 8 adapters"]) / base, 3
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), help="[default: %(default)s]")
    parser.add_argument("--replacements", type=int, default=200, help="[default: %(default)s]")
    parser.add_argument("--fair-seconds", type=float, default=90, help="[default: %(default)s]")
    parser.add_argument("--work-folder", type=Path, help="keeps the servers' logs")
    given = parser.parse_args()
    parts = given.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: no such part: {', '.join(sorted(unknown))}")
    result: dict[str, Any] = {"bench": "adapters", "model": "demo"}
    with contextlib.ExitStack() as stack:
        folder = given.work_folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            match part:
                case "replace":
                    found = asyncio.run(replace(folder, given.replacements))
                case "fair":
                    found = asyncio.run(fair(folder, given.fair_seconds))
                case "load":
                    found = asyncio.run(loading(folder))
                case "train":
                    found = asyncio.run(training(folder))
                case _:
                    found = mixed(folder)
            result[part] = found
            say(f"{part}: {json.dumps(found)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
