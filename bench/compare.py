"""Ours against vLLM's own server, in pairs, one server at a time; and the ceiling for both.

A pair is both servers on the same prompts, started one after the other in alternating order, so
that a machine that slows down in the meantime is nobody's advantage. Ratios are taken within pairs;
their geometric mean has a 95% t-interval over the pairs' logarithms.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ladder import Cells, Ladder, cell_name, climb, progress, table
from servers import DTYPE, ENGINE, packhorse, plain_vllm, quiet_environment

CEILING = Path(__file__).resolve().parent / "ceiling.py"
SERVERS = ("packhorse", "vllm")
# 97.5% point of Student's t by degrees of freedom, from 1; beyond the table the last one (a little
# wide).
STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """A ratio and where it should be: `held_to` says whether the estimate or an end of its interval
    must be within [low, high].
    """

    name: str
    ratio: Callable[[Cells, Cells], float]
    """(ours, vLLM's) of one pair."""
    low: float = 0.0
    high: float = math.inf
    held_to: Literal["estimate", "lower", "upper"] = "estimate"

    def wording(self) -> str:
        what = "" if self.held_to == "estimate" else f"{self.held_to} bound "
        if self.low and self.high < math.inf:
            return f"{what}{self.low} to {self.high}"
        return f"{what}>= {self.low}" if self.low else f"{what}<= {self.high}"


def goals(ladder: Ladder) -> list[Goal]:
    """The goals, at this ladder's levels."""
    top = ladder.top
    stream, whole = cell_name("stream", top), cell_name("whole", top)

    def of(cell: str, *names: str) -> Callable[[Cells, Cells], float]:
        def ratio(ours: Cells, theirs: Cells) -> float:
            our_value: Any = ours[cell]
            their_value: Any = theirs[cell]
            for name in names:
                our_value, their_value = our_value[name], their_value[name]
            return float(our_value) / float(their_value)

        return ratio

    def own_streaming(ours: Cells, theirs: Cells) -> float:
        return float(ours[stream]["tokens_per_s"]) / float(ours[whole]["tokens_per_s"])

    found = [
        Goal(f"API CPU per token, {stream}", of(stream, "api_cpu_us_per_token"), high=0.50),
        Goal(f"API CPU per token, {whole}", of(whole, "api_cpu_us_per_token"), high=0.90),
        Goal(f"tokens/s, {stream}", of(stream, "tokens_per_s"), low=0.97, held_to="lower"),
        Goal(f"requests/s, {whole}", of(whole, "requests_per_s"), low=0.97, held_to="lower"),
        Goal(f"events per token, {stream}", of(stream, "events_per_token"), low=0.95, high=1.05),
        Goal(
            f"inter-token p50, {stream}", of(stream, "inter_token_ms", "p50"), low=0.95, high=1.05
        ),
        Goal(f"ours: tokens/s {stream} over {whole}", own_streaming, low=0.93),
    ]
    for concurrency in ladder.concurrency:
        if concurrency < top:
            cell = cell_name("stream", concurrency)
            ratio = of(cell, "first_token_ms", "p50")
            found.append(Goal(f"TTFT p50, {cell}", ratio, high=1.03, held_to="upper"))
    return found


def at_one_speed(cells: Cells) -> Cells:
    """The cells as if the probe had taken 1 ms in each: for machines whose speed changes.

    Right as far as everything slows down with the probe: for CPU, and for times and rates of a load
    that keeps the CPUs busy.
    """
    return {name: _scaled(cell, cell["probe_us"] / 1000) for name, cell in cells.items()}


def _scaled(cell: dict[str, Any], slowness: float) -> dict[str, Any]:
    scaled: dict[str, Any] = {}
    for name, value in cell.items():
        if isinstance(value, dict):
            scaled[name] = {inner: number / slowness for inner, number in value.items()}
        elif name.endswith("_per_s"):
            scaled[name] = value * slowness
        elif name.endswith(("_us_per_token", "_s", "_us")):
            scaled[name] = value / slowness
        else:
            scaled[name] = value
    return scaled


def judge(goal: Goal, pairs: list[dict[str, Cells]]) -> dict[str, Any]:
    """Estimate, interval (None from one pair), whether the goal is met (None: cannot be said)."""
    logs = [math.log(goal.ratio(pair["packhorse"], pair["vllm"])) for pair in pairs]
    mean = statistics.fmean(logs)
    values = {"estimate": math.exp(mean)}
    if len(logs) > 1:
        degrees = min(len(logs) - 1, len(STUDENT_T))
        half = STUDENT_T[degrees - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
        values |= {"lower": math.exp(mean - half), "upper": math.exp(mean + half)}
    held = values.get(goal.held_to)
    return {
        "ratio": values["estimate"],
        "interval": [values["lower"], values["upper"]] if "lower" in values else None,
        "pairs": [math.exp(log) for log in logs],
        "met": None if held is None else goal.low <= held <= goal.high,
    }


def compare(
    folder: Path, ladder: Ladder, alternations: int, work_folder: Path, *, has_cache: bool = True
) -> dict[str, Any]:
    """Run all pairs on one checkpoint. `has_cache`: ours has a result cache, as by default; no
    prompt comes twice, so nothing is answered from it. Raises LoadError, or RuntimeError when a
    server fails.
    """
    starts = {
        "packhorse": lambda: packhorse(folder, work_folder, has_cache=has_cache),
        "vllm": lambda: plain_vllm(folder, work_folder, ("--dtype", DTYPE)),
    }
    pairs: list[dict[str, Cells]] = []
    for number in range(alternations):
        seeded = replace(ladder, seed=f"{ladder.seed}/{number}")
        pair: dict[str, Cells] = {}
        # A B, B A, A B, ...
        for name in list(SERVERS) if number % 2 == 0 else reversed(SERVERS):
            started_s = time.monotonic()
            progress(f"{number + 1}/{alternations} {name}: starting")
            with starts[name]() as server:
                pair[name] = climb(server, seeded)
            progress(f"{number + 1}/{alternations} {name}: {time.monotonic() - started_s:.0f} s")
            progress(table(pair[name]))
        pairs.append(pair)
    level = [{name: at_one_speed(cells) for name, cells in pair.items()} for pair in pairs]
    judged = {
        goal.name: {
            "goal": goal.wording(),
            "measured": judge(goal, pairs),
            "at_one_speed": judge(goal, level),
        }
        for goal in goals(ladder)
    }
    return {
        "alternations": alternations,
        "goals": judged,
        "disturbed": disturbed(pairs),
        "pairs": pairs,
    }


def medians(pairs: list[dict[str, Cells]], server: str) -> Cells:
    """One server's cells over all pairs: the median of every figure. For the table only."""
    return {name: _median([pair[server][name] for pair in pairs]) for name in pairs[0][server]}


def _median(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: _median([value[name] for value in values]) for name in values[0]}
    return None if values[0] is None else statistics.median(values)


def disturbed(pairs: list[dict[str, Cells]]) -> list[str]:
    """The cells during which something else had more than a tenth of a CPU: do not trust them."""
    return [
        f"pair {number} {server} {name} ({cell['others_cpus']:.2f})"
        for number, pair in enumerate(pairs, start=1)
        for server, cells in pair.items()
        for name, cell in cells.items()
        if cell["others_cpus"] > 0.1
    ]


def report(result: dict[str, Any]) -> str:
    """The comparison for people."""
    lines = []
    for server in SERVERS:
        lines += [f"\n{server}, medians", table(medians(result["pairs"], server))]
    lines += ["", f"{'ours / vLLM':40} {'as measured':>30}  {'at one speed':>30}  goal"]
    for name, row in result["goals"].items():
        judged = f"{_judged(row['measured'])}  {_judged(row['at_one_speed'])}"
        lines.append(f"{name:40} {judged}  {row['goal']}")
    lines.append("The goals' ratios with 95% intervals; ? where one pair cannot say.")
    if result["disturbed"]:
        lines.append(f"Something else ran during: {', '.join(result['disturbed'])}")
    return "\n".join(lines)


def _judged(row: dict[str, Any]) -> str:
    interval = "{:.3f} to {:.3f}".format(*row["interval"]) if row["interval"] else "-"
    met = {True: "yes", False: "NO", None: "?"}[row["met"]]
    return f"{row['ratio']:6.3f} {interval:>18}  {met:3}"


def ceiling(folder: Path, ladder: Ladder) -> dict[str, float]:
    """tokens/s of vllm.LLM on the highest level's whole-answer prompts, and its probe."""
    progress("ceiling: vllm.LLM")
    load = replace(ladder.load(ladder.top, "whole"), kind="ids")
    job = {"folder": str(folder), "engine": ENGINE, "load": asdict(load)}
    child = subprocess.run(
        [sys.executable, str(CEILING)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=quiet_environment(),
        check=False,
    )
    if child.returncode:
        raise RuntimeError(f"{CEILING.name} ended with {child.returncode}:\n{child.stderr[-4000:]}")
    result: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return result
