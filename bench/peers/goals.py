"""What the comparison is held to, as limits on figures of one model."""

from __future__ import annotations

from typing import Any

from peers.measure import Quality, ratio_interval

# (ours, theirs, at most): KL over KL.
KL_RATIOS = (
    ("gptq", "llmc-gptq", 0.80),
    ("gptq", "auto-round-200", 1.00),
    ("gptq", "rtn", 0.50),
    ("awq", "rtn-asym", 0.70),
    ("int8", "gptq", 0.10),
)
SECONDS_RATIOS = (("gptq", "llmc-gptq", 0.50), ("gptq", "llmc-gptq-float32", 0.50))
LOST_POINTS = ("int8", 0.5)


def goals(qualities: dict[str, Quality], runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Name, value, limit and whether it is met, of those whose figures are there.

    A ratio of KL has its interval (low, high); the estimate is what is held to the limit.
    """
    found: list[dict[str, Any]] = []

    def add(name: str, value: float, limit: float, **more: float) -> None:
        found.append({"name": name, "value": value, "limit": limit, "met": value <= limit, **more})

    for ours, theirs, limit in KL_RATIOS:
        if ours in qualities and theirs in qualities:
            interval = ratio_interval(qualities[ours], qualities[theirs])
            add(f"KL {ours} / {theirs}", interval.pop("ratio"), limit, **interval)
    name, limit = LOST_POINTS
    if name in qualities:
        lost = qualities["original"].task_score - qualities[name].task_score
        add(f"task points lost by {name}", round(100 * lost, 2), limit)
    for ours, theirs, limit in SECONDS_RATIOS:
        # Kept figures may be of other days; of other thread counts they say nothing.
        threads = {runs[name]["threads"] for name in (ours, theirs) if name in runs}
        if ours in runs and theirs in runs and len(threads) == 1:
            for unit in ("seconds", "cpu_seconds"):
                value = round(runs[ours][unit] / runs[theirs][unit], 3)
                add(f"{unit} {ours} / {theirs}", value, limit)
    return found
