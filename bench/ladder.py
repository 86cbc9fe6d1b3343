"""The ladder: the same load at growing concurrency, streaming and not, on one running server."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from typing import Any

from load import Kind, Load, LoadError, Target, bodies, path_of, run_cell
from servers import Server

Cells = dict[str, dict[str, Any]]
MODES = {"stream": True, "whole": False}


@dataclass(frozen=True)
class Ladder:
    """What is asked of a server. `requests`: per level, None for what suits each level."""

    concurrency: tuple[int, ...] = (1, 8, 32, 64)
    requests: int | None = None
    prompt_tokens: int = 64
    output_tokens: int = 64
    kind: Kind = "ids"
    seed: str = "0"

    @property
    def top(self) -> int:
        return max(self.concurrency)

    def load(self, concurrency: int, mode: str) -> Load:
        """One cell. Each has prompts of its own, so no prefix cache helps."""
        # Three full waves; a rest would run at less than the level's concurrency.
        requests = self.requests or max(12, 3 * concurrency)
        return Load(
            requests,
            concurrency,
            stream=MODES[mode],
            seed=f"{self.seed}/{mode}/{concurrency}",
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            kind=self.kind,
        )


def cell_name(mode: str, concurrency: int) -> str:
    return f"{mode}@{concurrency}"


def progress(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def climb(server: Server, ladder: Ladder) -> Cells:
    """Check, warm up, measure every cell. Raises LoadError."""
    check_counts(server.target, ladder)
    warm_up(server, ladder)
    cells: Cells = {}
    for concurrency in ladder.concurrency:
        for mode in MODES:
            load = ladder.load(concurrency, mode)
            cell, (before, after) = run_cell(server.target, load, server.cpu)
            if before is not None:
                client_s = cell["client_cpu_us_per_token"] * load.tokens / 1e6
                cell |= before.per_token_us(after, load.tokens)
                cell["others_cpus"] = before.others(after, client_s)
            cells[cell_name(mode, concurrency)] = {"requests": load.requests, **cell}
            progress(f"  {cell_name(mode, concurrency):10} {cell['tokens_per_s']:8.0f} tokens/s")
    return cells


def warm_up(server: Server, ladder: Ladder) -> None:
    """Load that is not counted, in both modes at the highest level and one by one."""
    for mode in MODES:
        for concurrency, requests in ((ladder.top, ladder.top), (1, 2)):
            load = replace(
                ladder.load(concurrency, mode),
                requests=requests,
                seed=f"warm-up/{ladder.seed}/{mode}/{concurrency}",
            )
            run_cell(server.target, load, server.cpu)


def check_counts(target: Target, ladder: Ladder) -> None:
    """One stream with usage: are the tokens as many as the cells will take for granted? Apart from
    the cells, whose streams are plain. Raises LoadError.
    """
    load = replace(ladder.load(1, "stream"), requests=1, seed=f"check/{ladder.seed}")
    (body,) = bodies(load, target.model)
    body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(
        target.url + path_of(load.kind),
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=load.timeout_s) as response:
            lines = response.read().decode().splitlines()
    except urllib.error.HTTPError as error:
        raise LoadError(f"{target.url} answered {error.code}: {error.read()[:4000]!r}") from error
    except OSError as error:
        raise LoadError(f"{target.url} does not answer: {error}") from error
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    events = [json.loads(text) for text in data if text != "[DONE]"]
    usages = [event["usage"] for event in events if event.get("usage")]
    if not usages:
        raise LoadError(f"{target.url} streams no usage; its last lines: {lines[-4:]}")
    wanted = {"completion_tokens": load.output_tokens}
    if load.kind == "ids":
        wanted["prompt_tokens"] = load.prompt_tokens
    for name, count in wanted.items():
        if usages[-1].get(name) != count:
            raise LoadError(f"{target.url}: {name} should be {count}, its usage is {usages[-1]}")


def table(cells: Cells) -> str:
    """All cells, for people. Times in milliseconds, CPU in microseconds per token."""
    rows = [
        f"{'':10} {'req/s':>7} {'tok/s':>7}  {'TTFT p50/p95/p99 ms':>22}  "
        f"{'inter-token p50/p95/p99':>23}  {'ev/tok':>6}  {'CPU us/token: API':>17} {'engine':>7} "
        f"{'client':>6} {'probe us':>8} {'others':>6}"
    ]
    for name, cell in cells.items():
        rows.append(
            f"{name:10} {cell['requests_per_s']:7.1f} {cell['tokens_per_s']:7.0f}  "
            f"{_three(cell.get('first_token_ms')):>22}  {_three(cell.get('inter_token_ms')):>23}  "
            f"{_number(cell.get('events_per_token'), 3):>6}  "
            f"{_number(cell.get('api_cpu_us_per_token'), 1):>17} "
            f"{_number(cell.get('engine_cpu_us_per_token'), 0):>7} "
            f"{cell['client_cpu_us_per_token']:6.1f} {cell['probe_us']:8.0f} "
            f"{_number(cell.get('others_cpus'), 2):>6}"
        )
    return "\n".join(rows)


def _three(percentiles: dict[str, float] | None) -> str:
    return "/".join(f"{value:.2f}" for value in percentiles.values()) if percentiles else "-"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
