"""gRPC beside HTTP: what a streamed token and a whole answer cost the server over each, in pairs.

Called by `python bench/serve_load.py --grpc`. One server with both protocols; rounds alternate
between them, with prompts of their own. The clients are processes of their own
(bench/load_client.py, bench/grpc_client.py) and are not compared.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_models import random_llama
from ladder import progress
from load import Load, run_cell
from servers import DTYPE, ENGINE, MODEL, Server, free_port, packhorse_with

ROUNDS = 3
STREAMS = Load(128, 64, stream=True, seed="")
WHOLE = Load(2000, 32, stream=False, seed="", prompt_tokens=17, output_tokens=16)
GOAL = 1.2


def grpc(work_folder: Path) -> dict[str, Any]:
    """On the real engine, streamed; on the echo engine, whole."""
    result: dict[str, Any] = {"dtype": DTYPE, "rounds": ROUNDS}
    folder = random_llama(work_folder / "llama-25m")
    rpc_port = free_port()
    settings = {"engine": {**ENGINE, "dtype": DTYPE}, "rpc": {"port": rpc_port}}
    with packhorse_with(folder, work_folder, settings) as server:
        cells = pairs(server, rpc_port, STREAMS)
    result["streams"] = {
        name: median_of(found, "api_cpu_us_per_token") for name, found in cells.items()
    }
    result["streams, tokens/s"] = {
        n: median_of(found, "tokens_per_s") for n, found in cells.items()
    }
    result["events_per_token"] = {n: median_of(f, "events_per_token") for n, f in cells.items()}
    ratios = [
        ours["api_cpu_us_per_token"] / http["api_cpu_us_per_token"]
        for ours, http in zip(cells["grpc"], cells["http"], strict=True)
    ]
    result["ratio"] = geometric(ratios)
    result["ratios"] = [round(ratio, 3) for ratio in ratios]
    result["goal"] = GOAL
    result["met"] = result["ratio"] <= GOAL
    settings = {"engine": {"kind": "echo"}, "rpc": {"port": rpc_port}}
    with packhorse_with(folder, work_folder, settings) as server:
        cells = pairs(server, rpc_port, WHOLE)
    result["whole, echo, requests/s"] = {
        name: median_of(found, "requests_per_s") for name, found in cells.items()
    }
    result["whole, echo, CPU us/request"] = {
        name: median_of(found, "api_cpu_us_per_token") * WHOLE.output_tokens
        for name, found in cells.items()
    }
    return result


def pairs(server: Server, rpc_port: int, load: Load) -> dict[str, list[dict[str, Any]]]:
    cells: dict[str, list[dict[str, Any]]] = {"http": [], "grpc": []}
    over_rpc = {"model": MODEL, "address": f"127.0.0.1:{rpc_port}"}
    for number in range(-1, ROUNDS):  # the first is not counted
        for name, found in cells.items():
            several = replace(load, seed=f"{name} {number} {load.stream}")
            how = over_rpc if name == "grpc" else None
            cell, (before, after) = run_cell(server.target, several, server.cpu, rpc=how)
            cell |= before.per_token_us(after, several.tokens)
            if number >= 0:
                found.append(cell)
            progress(f"  {name}: {cell['api_cpu_us_per_token']:.1f} us/token")
    return cells


def median_of(cells: list[dict[str, Any]], name: str) -> float:
    return round(statistics.median(cell[name] or 0.0 for cell in cells), 3)


def geometric(ratios: list[float]) -> float:
    return round(math.exp(statistics.fmean(map(math.log, ratios))), 3)


def report(result: dict[str, Any]) -> str:
    met = "met" if result["met"] else "NOT met"
    return (
        f"server CPU per streamed token, 64 streams: {result['streams']} us; gRPC / HTTP "
        f"{result['ratio']} (goal {result['goal']}: {met})\n"
        f"whole answers on the echo engine: {result['whole, echo, requests/s']} requests/s"
    )
