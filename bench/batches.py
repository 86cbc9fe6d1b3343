"""What a batch costs live calls: their latencies alone and beside a batch, on the demo model. Ends
in one line of JSON.

    python bench/batches.py                         # about 5 minutes
    python bench/batches.py --share 1               # always one line beside live calls

Live calls are streamed chats of callers that think for a random time between two. Short rounds
alone and beside a batch follow each other in turn, with the same thinking, so that what else the
machine does meets both. The batch has more lines than it can run. No result is from the cache,
which is off. The client runs in this process and shares the CPUs with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from servers import DTYPE, packhorse_with

DEMO = Path(__file__).resolve().parent.parent / "demo"
CHAT = "/v1/chat/completions"
TOPICS = ("rivers", "bread", "winter", "music", "stones", "letters", "gardens", "ships")


@dataclass
class Times:
    """Seconds of calls, from sending to the first token and to the last."""

    first_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        return {
            f"{name}_{label}_ms": round(1000 * quantile(values, share), 1)
            for name, values in (("first_token", self.first_s), ("total", self.total_s))
            for label, share in (("p50", 0.5), ("p95", 0.95))
        } | {"total_mean_ms": round(1000 * statistics.fmean(self.total_s), 1)}


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def body(text: str, tokens: int, **fields: Any) -> dict[str, Any]:
    return {
        "model": "bench",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "ignore_eos": True,
        **fields,
    }


def question(number: int, dice: random.Random) -> str:
    """Its own beginning, so that no prompt has a prefix in the cache."""
    return f"{number}: tell me about " + " and ".join(dice.choices(TOPICS, k=12)) + "."


async def call(client: httpx.AsyncClient, text: str, tokens: int, times: Times) -> None:
    began_s = time.monotonic()
    first_s = None
    request = body(text, tokens, stream=True)
    async with client.stream("POST", CHAT, json=request) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if first_s is None and '"content": "' in line and '"content": ""' not in line:
                first_s = time.monotonic() - began_s
    times.total_s.append(time.monotonic() - began_s)
    times.first_s.append(times.total_s[-1] if first_s is None else first_s)


async def live(client: httpx.AsyncClient, options: Any, seed: int, offset: int) -> Times:
    """One round of live calls, of callers that think between them."""
    times = Times()
    end_s = time.monotonic() + options.seconds

    async def caller(place: int) -> None:
        dice = random.Random(seed * 100 + place)
        number = 0
        while time.monotonic() < end_s:
            await asyncio.sleep(dice.expovariate(1 / options.think) if options.think else 0)
            number += 1
            text = question(offset + 100 * place + number, dice)
            await call(client, text, options.tokens, times)

    await asyncio.gather(*map(caller, range(options.callers)))
    return times


async def submit(client: httpx.AsyncClient, lines: int, tokens: int) -> str:
    dice = random.Random(1)
    made = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": CHAT,
            "body": body(question(10**6 + number, dice), tokens),
        }
        for number in range(lines)
    ]
    content = "\n".join(map(json.dumps, made)).encode()
    files = {"file": ("bench.jsonl", content)}
    file = (await client.post("/v1/files", files=files, data={"purpose": "batch"})).json()
    asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    batch = (await client.post("/v1/batches", json=asked)).json()
    while batch["status"] == "validating":
        await asyncio.sleep(0.1)
        batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
    assert batch["status"] == "in_progress", batch
    return str(batch["id"])


async def answered(client: httpx.AsyncClient, batch_id: str) -> int:
    batch = (await client.get(f"/v1/batches/{batch_id}")).json()
    assert batch["status"] in ("in_progress", "cancelling", "cancelled"), batch["status"]
    assert batch["request_counts"]["failed"] == 0 or batch["status"] != "in_progress"
    return int(batch["request_counts"]["completed"])


async def measure(client: httpx.AsyncClient, options: Any) -> dict[str, Any]:
    await live(client, options, 0, 10**7)  # warms the engine up
    alone, beside = Times(), Times()
    lines = 0
    for number in range(options.rounds):
        for times, has_batch in ((alone, False), (beside, True)):
            batch_id = ""
            if has_batch:
                batch_id = await submit(client, options.lines, options.line_tokens)
                await asyncio.sleep(1)
                before = await answered(client, batch_id)
            offset = number * 2000 + has_batch * 1000
            found = await live(client, options, 100 + number, offset)
            times.first_s += found.first_s
            times.total_s += found.total_s
            if has_batch:
                lines += await answered(client, batch_id) - before
                await client.post(f"/v1/batches/{batch_id}/cancel")
                await asyncio.sleep(1)
            print(f"round {number} {'beside' if has_batch else 'alone '} {found.summary()}")
    # What the batch does without live calls.
    batch_id = await submit(client, options.lines, options.line_tokens)
    await asyncio.sleep(3)
    before, began_s = await answered(client, batch_id), time.monotonic()
    await asyncio.sleep(10)
    free = (await answered(client, batch_id) - before) / (time.monotonic() - began_s)
    first, second = alone.summary(), beside.summary()
    return {
        "alone": first,
        "beside": second,
        "ratio": {name: round(second[name] / first[name], 3) for name in first},
        "calls": len(alone.total_s),
        "lines_per_s_beside": round(lines / (options.rounds * options.seconds), 2),
        "lines_per_s_free": round(free, 2),
    }


async def main(options: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "batches": {
                "folder": f"{folder}/kept",
                "share_beside_live": options.share,
                "concurrency": options.concurrency,
            },
            "engine": {"dtype": DTYPE, "max_num_seqs": 64},
        }
        with packhorse_with(DEMO / "model", Path(folder), settings) as server:
            url = server.target.url
            async with httpx.AsyncClient(base_url=url, timeout=300) as client:
                found = await measure(client, options)
    found["options"] = vars(options)
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--think", type=float, default=0.5, help="mean seconds; 0: never")
    parser.add_argument("--tokens", type=int, default=60, help="of a live answer")
    parser.add_argument("--line-tokens", type=int, default=60, help="of a line's answer")
    parser.add_argument("--lines", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=10, help="of a round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.03)
    parser.add_argument("--concurrency", type=int, default=None)
    asyncio.run(main(parser.parse_args()))
    sys.exit(0)
