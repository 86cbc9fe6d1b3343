"""A part of faults.py: three clients ask ten times with one poison each, others beside them.

The poison is a prompt at which the engine's worker (that of tests/e2e/faulty_worker.py) ends. A
client asks again after 503, as SDKs do, until it gets an answer or 400: that is one of the ten.
"""

from __future__ import annotations

import asyncio
import collections
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
POISON = (301, 302, 303, 304)
PATH = "/v1/completions"
OTHERS = 8
POISONS = 3
TIMES = 10
TOKENS = 100
REFUSAL = "Two engines have stopped"


async def until_answered(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, int]:
    """The final status and how often it was 503 before."""
    for waits in range(10**6):
        response = await http.post(PATH, json=body)
        if response.status_code != 503:
            is_poison = response.status_code == 400 and REFUSAL in response.text
            return ("refused as poison" if is_poison else str(response.status_code)), waits
        await asyncio.sleep(0.1)
    raise AssertionError("no answer")


async def poison(
    open_server: Callable[..., AbstractAsyncContextManager[Any]], work_folder: Path
) -> dict[str, Any]:
    """Deaths, what the poisoned clients and the others got, how fast refusals were."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for the worker's class
    engine = {"worker_cls": "tests.e2e.faulty_worker.FaultyWorker"}
    async with open_server(work_folder, engine=engine) as clients:
        http: httpx.AsyncClient = clients.http
        over = asyncio.Event()
        others: collections.Counter[str] = collections.Counter()
        poisoned: collections.Counter[str] = collections.Counter()
        refused_s: list[float] = []
        held: collections.Counter[str] = collections.Counter()
        started_s = time.perf_counter()

        async def good(number: int) -> None:
            asked = {"model": "bench", "max_tokens": TOKENS, "ignore_eos": True}
            prompt = f"Story {number}:"  # of their own, or one would be taken for the other
            while not over.is_set():
                status, waits = await until_answered(http, {**asked, "prompt": prompt})
                others[status] += 1
                held["others"] += waits

        async def bad(number: int) -> None:
            for time_ in range(TIMES):
                prompt = [*POISON, 5 + number]
                asked = {"model": "bench", "prompt": prompt, "seed": time_, "max_tokens": 5 + time_}
                at_s = time.perf_counter()
                status, waits = await until_answered(http, asked)
                poisoned[status] += 1
                held["poisoned"] += waits
                if time_ and status == "refused as poison":
                    refused_s.append(time.perf_counter() - at_s)

        running = [asyncio.create_task(good(number)) for number in range(OTHERS)]
        await asyncio.gather(*(bad(number) for number in range(POISONS)))
        over.set()
        await asyncio.gather(*running)
        metric = clients.metric
        return {
            "poisons": POISONS,
            "times": TIMES,
            "seconds": round(time.perf_counter() - started_s, 1),
            "engine_deaths": await metric("packhorse_engine_failures_total"),
            "found": await metric("packhorse_requests_poison_total"),
            "refused_without_a_death": await metric("packhorse_requests_poison_refused_total"),
            "poisoned_got": dict(poisoned),
            "others_got": dict(others),
            "waits_for_a_new_engine": dict(held),
            # Those that had to wait for an engine to be refused by are among them.
            "refusal_p50_ms": round(1000 * statistics.median(refused_s or [0]), 1),
            "refusal_max_ms": round(1000 * max(refused_s, default=0), 1),
            "is_ready": (await http.get("/health/ready")).status_code == 200,
        }
