"""The server of adapters.py, and what its parts share."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from safetensors.torch import load_file, save_file
from servers import MODEL, packhorse_with

DEMO = Path(__file__).resolve().parent.parent / "demo"
ADAPTERS = DEMO / "adapters"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CLIENTS = 32
STREAMS = 4


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)


def copies(folder: Path, count: int) -> list[str]:
    """So many adapters that differ a little from `code`; their names."""
    names = [f"a{number:02}" for number in range(count)]
    for number, name in enumerate(names):
        shutil.copytree(ADAPTERS / "code", folder / name)
        path = folder / name / "adapter_model.safetensors"
        tensors = load_file(path)
        first = min(tensors)
        tensors[first] = tensors[first] * (1 + number / 50)
        save_file(tensors, path)
    return names


@contextlib.asynccontextmanager
async def server(
    work_folder: Path, adapters: Path | None, *, routes: Path | None = None, **engine: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, int]]:
    """A client of it, and its process id."""
    store = Path(tempfile.mkdtemp(dir=work_folder))
    settings = {
        "engine": {"max_num_seqs": CLIENTS, "max_cpu_loras": 64, **engine},
        "adapters": {
            "store": str(store),
            "allowed_roots": [str(ADAPTERS)],
            **({"folder": str(adapters)} if adapters else {}),
        },
        "admission": {"max_in_engine": 4096, "max_queued_tokens": 10**9},
        "routing": {"file": str(routes)} if routes else {},
    }
    with packhorse_with(DEMO / "model", work_folder, settings) as running:
        assert running.api_pid is not None
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=running.target.url, timeout=600, limits=limits
        ) as http:
            yield http, running.api_pid


def rss_mb(pid: int) -> float:
    """Of the server and everything below it."""
    server = psutil.Process(pid)
    total = 0.0
    for process in [server, *server.children(recursive=True)]:
        total += process.memory_info().rss
    return round(total / 2**20, 1)


async def put(http: httpx.AsyncClient, name: str, path: Path) -> None:
    body = {"name": name, "path": str(path), "replace": True}
    (await http.post("/admin/adapters", json=body)).raise_for_status()


async def resident(http: httpx.AsyncClient) -> int:
    lines = (await http.get("/metrics")).text.splitlines()
    (line,) = (line for line in lines if line.startswith("packhorse_adapters_resident{"))
    return int(float(line.rpartition(" ")[2]))


@contextlib.asynccontextmanager
async def streams(http: httpx.AsyncClient, gaps: list[float]) -> AsyncIterator[None]:
    """Some that go on all the time, and the seconds between their tokens."""
    body = {
        "model": MODEL, "prompt": "The", "max_tokens": 1900, "ignore_eos": True, "stream": True,
    }  # fmt: skip

    async def one() -> None:
        while True:
            async with http.stream("POST", TEXT, json=body) as response:
                last_s = None
                async for line in response.aiter_lines():
                    if line:
                        now_s = time.perf_counter()
                        if last_s is not None:
                            gaps.append(now_s - last_s)
                        last_s = now_s

    tasks = [asyncio.create_task(one()) for _ in range(STREAMS)]
    await asyncio.sleep(3)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
