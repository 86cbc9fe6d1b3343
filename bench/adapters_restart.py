"""What adapters cost a restart: the time from the start to ready, and what the server reads and
writes meanwhile. Ends in one line of JSON. Where others use the machine too, the least of a figure
says more than its median, and the CPU more than the time.

    python bench/adapters_restart.py                    # the echo engine, about 3 minutes
    python bench/adapters_restart.py --engine vllm      # the demo model, about 10 minutes
    python bench/adapters_restart.py --cold             # nothing of the adapters in the page cache

A server without adapters and one with so many in its watched folder and its store are started in
turn; the first start with adapters, which copies them, is told apart. `read` and `written` are
rchar and wchar of /proc/PID/io, which count what comes from the page cache too: of the server's
process alone, at ready, and once no more adapters get into the engine. Adapters are of random
numbers, with no examples: nothing is trained.

To measure another tree, set PYTHONPATH to it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from servers import DTYPE, cpu_s, free_port, quiet_environment

from packhorse.serve.adapters.base_layers import linear_layers

DEMO = Path(__file__).resolve().parent.parent / "demo"
QUIET_S = 2.0  # without another adapter in the engine: there come no more


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def hollow_base(folder: Path) -> Path:
    """A checkpoint whose weights are a hole in a file: the echo engine reads its header alone, and
    adapters of rank 16, which is all that it takes, are large on it.
    """
    sizes = {"self_attn.q_proj": (1024, 1024), "mlp.up_proj": (2816, 1024)}
    header: dict[str, Any] = {}
    end = 0
    for layer in range(52):
        for name, shape in sizes.items():
            start, end = end, end + 2 * math.prod(shape)
            header[f"model.layers.{layer}.{name}.weight"] = {
                "dtype": "BF16", "shape": list(shape), "data_offsets": [start, end],
            }  # fmt: skip
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def make_adapters(folder: Path, base: Path, count: int, size: int, max_rank: int) -> float:
    """So many of about so many bytes; returns the MB of one."""
    layers = linear_layers(base)
    per_rank = 4 * sum(outputs + inputs for outputs, inputs in layers.values())
    rank = max(1, min(max_rank, round(size / per_rank)))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }  # fmt: skip
    folder.mkdir()
    for number in range(count):
        torch.manual_seed(number)
        tensors = {}
        for name, (outputs, inputs) in layers.items():
            stem = f"base_model.model.{name}.lora_"
            tensors[f"{stem}A.weight"] = torch.randn(rank, inputs) / 100
            tensors[f"{stem}B.weight"] = torch.randn(outputs, rank) / 100
        inner = folder / f"a{number:03}"
        inner.mkdir()
        save_file(tensors, inner / "adapter_model.safetensors")
        (inner / "adapter_config.json").write_text(json.dumps(config))
    return round(rank * per_rank / 1e6, 1)


def io_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    counted = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return {"read": counted["rchar"], "written": counted["wchar"]}


def get(url: str) -> str | None:
    """None where nobody answers, or not with 200."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


def resident(url: str) -> tuple[int, int]:
    """Adapters that are registered, and those in the engine."""
    lines = [line.rsplit(" ", 1) for line in (get(f"{url}/metrics") or "").splitlines()]
    values = {series.partition("{")[0]: value for series, value in lines}
    names = ("packhorse_adapters", "packhorse_adapters_resident")
    return int(float(values[names[0]])), int(float(values[names[1]]))


def start(config: Path, model: Path, work_folder: Path) -> dict[str, Any]:
    """One start, to its end."""
    port = free_port()
    words: list[Any] = [
        sys.executable, "-c", "from packhorse.serve.cli import app; app()", "serve", model,
        "--config", config, "--port", port, "--log-level", "warning",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    log_path = work_folder / "server.log"
    with log_path.open("ab") as log:
        started_s = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in words], stdout=log, stderr=log, cwd=work_folder,
            env=quiet_environment(),
        )  # fmt: skip
    try:
        while get(f"{url}/health/ready") is None:
            if process.poll() is not None:
                raise RuntimeError(f"The server ended; {log_path}: {log_path.read_text()[-3000:]}")
            time.sleep(0.01)
        ready_s, at_ready = time.monotonic() - started_s, io_of(process.pid)
        ready_cpu_s = cpu_s(process.pid)
        registered, before = resident(url)
        at_ready_resident, last_s = before, time.monotonic()
        while time.monotonic() - last_s < QUIET_S:
            time.sleep(0.1)
            now = resident(url)[1]
            if now != before:
                before, last_s = now, time.monotonic()
        return {
            "ready_s": round(ready_s, 3),
            "ready_cpu_s": round(ready_cpu_s, 3),
            "at_ready": at_ready,
            "in_the_end": io_of(process.pid),
            "registered": registered,
            "resident": [at_ready_resident, before],
        }
    finally:
        process.terminate()
        process.wait(120)


def evict(*folders: Path) -> None:
    """From the page cache."""
    os.sync()
    for folder in folders:
        for path in folder.rglob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--engine", choices=["echo", "vllm"], default="echo")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--bytes", type=int, default=20_000_000, help="of one adapter")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    asked = parser.parse_args()
    work_folder = Path(tempfile.mkdtemp(prefix="restart-"))
    try:
        print(json.dumps(measure(asked, work_folder)))
    finally:
        shutil.rmtree(work_folder)


def measure(asked: argparse.Namespace, work_folder: Path) -> dict[str, Any]:
    echoes = asked.engine == "echo"
    max_rank = 16 if echoes else 512
    model = hollow_base(work_folder / "base") if echoes else DEMO / "model"
    engine = {"kind": "echo"} if echoes else {"max_lora_rank": max_rank, "dtype": DTYPE}
    adapters = work_folder / "adapters"
    mb = make_adapters(adapters, model, asked.count, asked.bytes, max_rank)
    say(f"{asked.count} adapters of {mb} MB")
    (work_folder / "none").mkdir()
    configs = {}
    for name, folder in (("none", work_folder / "none"), ("adapters", adapters)):
        store = work_folder / f"store-{name}"
        settings = {
            "engine": engine,
            "cache": {"enabled": False},
            "adapters": {"folder": str(folder), "store": str(store)},
        }
        configs[name] = work_folder / f"{name}.yaml"
        configs[name].write_text(json.dumps(settings))
    runs: dict[str, list[dict[str, Any]]] = {"none": [], "adapters": []}
    start(configs["none"], model, work_folder)  # what is imported comes into the page cache
    first = start(configs["adapters"], model, work_folder)
    say(f"first: {first}")
    for _ in range(asked.rounds):
        for name, config in configs.items():
            if asked.cold:
                evict(adapters, work_folder / "store-adapters")
            runs[name].append(start(config, model, work_folder))
            say(f"{name}: {runs[name][-1]}")
    figures: dict[str, Any] = {}
    for figure in ("ready_s", "ready_cpu_s"):
        for what, choose in (("median", statistics.median), ("least", min)):
            of = {name: choose(run[figure] for run in found) for name, found in runs.items()}
            figures[f"{figure}, {what}"] = {**of, "ratio": round(of["adapters"] / of["none"], 3)}
    return {
        "engine": asked.engine,
        "adapters": asked.count,
        "mb_each": mb,
        "cold": asked.cold,
        **figures,
        "first": first,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
