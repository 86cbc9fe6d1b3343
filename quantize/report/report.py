"""The quality report of a run, filled in by run.py: quantize_report.json, and a table for the
terminal. docs/quality-report.md describes every key.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from packhorse.quantize.model.memory import peak_memory_bytes
from packhorse.quantize.output.convert import LayerResult
from packhorse.quantize.report.verdict import REPORT_VERSION, verdict

SUSPICIOUS_NATS = 0.5
"""Mean change of log-probabilities in vLLM above which the report has a loud note."""
RARE_TOKENS = 256
"""Experts with fewer calibration tokens get a note."""


@dataclass(frozen=True)
class Stage:
    """One part of a run: its time, and the peak memory of the process up to its end."""

    name: str
    seconds: float
    peak_memory_bytes: int


@dataclass
class Report:
    """The content of `quantize_report.json`. Fields that stay empty were not measured, and the
    verdict says so.
    """

    source: str
    plan: dict[str, Any]
    bytes_before: int
    bytes_after: int = 0
    seconds: float = 0.0
    weights_sha256: str = ""
    quality_before: dict[str, Any] = field(default_factory=dict)
    quality_after: dict[str, Any] = field(default_factory=dict)
    divergence: dict[str, Any] | None = None
    """From `quality.measure.measure_divergence`."""
    weights_before: dict[str, Any] | None = None
    weights_after: dict[str, Any] | None = None
    """Both from `model.sizes.of`."""
    seed: int | None = None
    stages: list[Stage] = field(default_factory=list)
    eval_data: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    load_check: dict[str, Any] | None = None
    layers: list[LayerResult] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    """Layers for which the search for smoothing factors found none better than ones."""
    experts: dict[str, list[int]] = field(default_factory=dict)
    """Calibration tokens that were routed to each expert, by block."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the time and memory of what happens within, unless it fails."""
        started_s = time.monotonic()
        yield
        seconds = round(time.monotonic() - started_s, 2)
        self.stages.append(Stage(name, seconds, peak_memory_bytes()))

    def as_json(self) -> dict[str, Any]:
        document = self._facts()
        return {**document, "verdict": verdict(document).as_json()}

    def _facts(self) -> dict[str, Any]:
        return {
            "report_version": REPORT_VERSION,
            "source": self.source,
            **{key: self.plan[key] for key in ("method", "format", "bits", "group_size")},
            "plan": self.plan,
            "calibration": self.calibration,
            "bytes": {
                "before": self.bytes_before,
                "after": self.bytes_after,
                "ratio": round(self.bytes_after / self.bytes_before, 4),
            },
            "weights": {"before": self.weights_before, "after": self.weights_after},
            "seconds": round(self.seconds, 2),
            "stages": [asdict(stage) for stage in self.stages],
            "peak_memory_bytes": max((s.peak_memory_bytes for s in self.stages), default=None),
            "seed": self.seed,
            "weights_sha256": self.weights_sha256,
            "quality": {
                "how": "simulated with transformers, greedy, from the files on disk",
                "measured_with": self.eval_data,
                "before": self.quality_before,
                "after": self.quality_after,
                "distance": self.divergence,
            },
            "unscaled_layers": self.unscaled,
            "experts": self.experts,
            "proof": self.load_check,
            "layers": [layer.as_json() for layer in self.layers],
            "notes": self.notes,
            "versions": self.versions,
        }

    def as_table(self) -> Table:
        """For the terminal: before and after, side by side."""
        table = Table(
            title=f"{self.plan['method']}: {Path(self.source).name}, {self.seconds:.1f} s",
            title_justify="left",
        )
        table.add_column("")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        table.add_row(
            "size", f"{self.bytes_before / 1e6:.1f} MB", f"{self.bytes_after / 1e6:.1f} MB"
        )
        before, after = self.quality_before, self.quality_after
        if "perplexity" in before:
            table.add_row(
                "perplexity (lower is better)",
                f"{before['perplexity']:.3f}",
                f"{after['perplexity']:.3f}",
            )
        if self.divergence and "kl_mean" in self.divergence:
            table.add_row("KL divergence, mean (nats)", "", f"{self.divergence['kl_mean']:.4g}")
            table.add_row("same likeliest token", "", f"{self.divergence['top1_agreement']:.1%}")
        if "score" in before:
            table.add_section()
            shown = [score["exact_match"] for score in (before["score"], after["score"])]
            table.add_row(
                f"right answers of {before['score']['questions']}",
                *(f"{value:.1%}" for value in shown),
            )
            for domain, value in before["score"]["by_domain"].items():
                table.add_row(
                    f"  {domain}", f"{value:.1%}", f"{after['score']['by_domain'][domain]:.1%}"
                )
        if self.load_check:
            table.add_section()
            table.add_row("kernel in vLLM", "", self.load_check["kernel"])
            if compared := self.load_check.get("compared"):
                table.add_row("answers as the original's", "", f"{compared['answers_equal']:.0%}")
                moved = f"{compared['logprob_difference_mean']:.3f}"
                table.add_row("log-probabilities moved by", "", moved)
        table.add_section()
        table.add_row("verdict", "", verdict(self._facts()).level)
        return table


def rare_expert_notes(experts: dict[str, list[int]]) -> list[str]:
    """At most one note, on experts with few calibration tokens. `experts` has the tokens of each
    expert, by block.
    """
    rare = [
        f"{block}, expert {number}: {count}"
        for block, counts in experts.items()
        for number, count in enumerate(counts)
        if count < RARE_TOKENS
    ]
    if not rare:
        return []
    return [
        f"{len(rare)} experts were sent fewer than {RARE_TOKENS} calibration tokens, and are "
        f"quantized by a sample of the others' too ({'; '.join(rare[:3])}); more varied text helps"
    ]


def load_check_notes(load_check: dict[str, Any]) -> list[str]:
    """Notes on a load check that passed: a large change from the original, a missing comparison."""
    found = []
    moved = load_check.get("compared", {}).get("logprob_difference_mean", 0.0)
    if moved > SUSPICIOUS_NATS:
        found.append(
            f"LOOK AT THIS: in vLLM log-probabilities moved by {moved:.2f} on average from the "
            f"original's, more than {SUSPICIOUS_NATS}: vLLM computes what the codes say, but the "
            "codes may be of no use"
        )
    if isinstance(load_check["reference"], str):
        found.append(
            "load check: vLLM's results were not compared with the codes: "
            f"{load_check['reference']}"
        )
    return found
