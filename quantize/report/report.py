"""The quality report: what a checkpoint knew before and knows after, as JSON and as a table for
people. docs/quality-report.md has every key.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from packhorse.quantize.calibration.statistics import Inputs
from packhorse.quantize.methods import Rounded
from packhorse.quantize.numerics.grid import relative_error
from packhorse.quantize.quality import dequantized
from packhorse.quantize.quality import divergence as distance
from packhorse.quantize.quality.eval_data import Yardstick, tokenizer_of
from packhorse.quantize.quality.evaluate import (
    count_predictions,
    greedy_answers,
    perplexity,
    read_questions,
    read_texts,
    score,
)
from packhorse.quantize.report.verdict import REPORT_VERSION, verdict
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

SUSPICIOUS_NATS = 0.5
RARE_TOKENS = 256
# (what is being measured, how many steps) -> a function to call with each finished step count
Progress = Callable[[str, int], Callable[[int], None]]


def measure(folder: Path, yardstick: Yardstick, stage: str, progress: Progress) -> dict[str, Any]:
    """Score and perplexity of the checkpoint in `folder`, as far as the yardstick goes; `stage`
    labels the progress.
    """
    if not yardstick.eval_file and not yardstick.text_file:
        return {}
    tokenizer = tokenizer_of(folder)
    model: PreTrainedModel = dequantized.load(folder)
    figures: dict[str, Any] = {}
    if yardstick.text_file:
        texts = read_texts(yardstick.text_file, tokenizer)
        figures["predictions"] = count_predictions(texts)
        figures["perplexity"] = round(
            perplexity(model, texts, advance=progress(f"perplexity {stage}", len(texts))), 4
        )
    if yardstick.eval_file:
        questions = read_questions(yardstick.eval_file)
        answers = greedy_answers(
            model, tokenizer, questions, advance=progress(f"score {stage}", len(questions))
        )
        figures["score"] = score(questions, answers).as_json()
    return figures


def measure_distance(
    original: Path, made: Path, yardstick: Yardstick, progress: Progress
) -> dict[str, Any] | None:
    """How far the predictions of `made` are from the original's on the held-out text; None where
    there is none. Where memory does not hold both models, {"left_out": why}.
    """
    if not yardstick.text_file:
        return None
    texts = read_texts(yardstick.text_file, tokenizer_of(original))
    advance = progress("comparing predictions", len(texts))
    return distance.between(original, made, texts, advance=advance)


def peak_memory_bytes() -> int:
    """The most memory (resident) that this process has held so far, children not counted."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere


@dataclass(frozen=True)
class Stage:
    """One part of a run: how long it took, and the most memory the process had held by its end."""

    name: str
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Layer:
    """One quantized linear layer. relative_error is of its weights, squared; output_error of what
    it puts out on the calibration rows, where there were any. Both count what the weight was
    corrected by (methods/correction.py), which serves the model and not the layer.
    """

    name: str
    bits: int
    relative_error: float
    output_error: float | None = None
    note: str | None = None

    @classmethod
    def of(
        cls, name: str, weight_OI: Tensor, rounded: Rounded, inputs: Inputs | None = None
    ) -> Layer:
        output = None
        if inputs is not None:
            weight_OI = weight_OI.float()
            error_OI = rounded.codes.dequantize() - weight_OI
            lost = ((error_OI @ inputs.hessian_II) * error_OI).sum()
            whole = ((weight_OI @ inputs.hessian_II) * weight_OI).sum()
            output = (lost / whole.clamp_min(1e-30)).item()
        relative = relative_error(weight_OI, rounded.codes)
        return cls(name, rounded.codes.grid.bits, relative, output, rounded.note)

    def as_json(self) -> dict[str, Any]:
        figures = {"relative_error": self.relative_error, "output_error": self.output_error}
        rounded = {k: float(f"{v:.3e}") for k, v in figures.items() if v is not None}
        noted = {"note": self.note} if self.note else {}
        return {"name": self.name, "bits": self.bits, **rounded, **noted}


@dataclass
class Report:
    """All that `quantize_report.json` holds; filled in as the run goes. What stays empty was not
    measured, and the verdict says so.
    """

    source: str
    plan: dict[str, Any]
    bytes_before: int
    bytes_after: int = 0
    seconds: float = 0.0
    weights_sha256: str = ""
    quality_before: dict[str, Any] = field(default_factory=dict)
    quality_after: dict[str, Any] = field(default_factory=dict)
    distance: dict[str, Any] | None = None
    """From `measure_distance`."""
    weights_before: dict[str, Any] | None = None
    weights_after: dict[str, Any] | None = None
    """Both from `sizes.of`."""
    seed: int | None = None
    stages: list[Stage] = field(default_factory=list)
    yardstick: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    proof: dict[str, Any] | None = None
    layers: list[Layer] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    """Layers for which a search of scales found nothing better than leaving them."""
    experts: dict[str, list[int]] = field(default_factory=dict)
    """Calibration tokens that were sent to each expert, by block."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside is one of the run's stages, unless it fails."""
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
                "measured_with": self.yardstick,
                "before": self.quality_before,
                "after": self.quality_after,
                "distance": self.distance,
            },
            "unscaled_layers": self.unscaled,
            "experts": self.experts,
            "proof": self.proof,
            "layers": [layer.as_json() for layer in self.layers],
            "notes": self.notes,
            "versions": self.versions,
        }

    def as_table(self) -> Table:
        """Before and after, side by side."""
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
        if self.distance and "kl_mean" in self.distance:
            table.add_row("KL divergence, mean (nats)", "", f"{self.distance['kl_mean']:.4g}")
            table.add_row("same likeliest token", "", f"{self.distance['top1_agreement']:.1%}")
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
        if self.proof:
            table.add_section()
            table.add_row("kernel in vLLM", "", self.proof["kernel"])
            if compared := self.proof.get("compared"):
                table.add_row("answers as the original's", "", f"{compared['answers_equal']:.0%}")
                moved = f"{compared['logprob_difference_mean']:.3f}"
                table.add_row("log-probabilities moved by", "", moved)
        table.add_section()
        table.add_row("verdict", "", verdict(self._facts()).level)
        return table


def rare_experts(experts: dict[str, list[int]]) -> list[str]:
    """A note where experts were sent too little, by the tokens of each in every block."""
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


def doubts(proof: dict[str, Any]) -> list[str]:
    """What a load proof that did not fail leaves open."""
    found = []
    moved = proof.get("compared", {}).get("logprob_difference_mean", 0.0)
    if moved > SUSPICIOUS_NATS:
        found.append(
            f"LOOK AT THIS: in vLLM log-probabilities moved by {moved:.2f} on average from the "
            f"original's, more than {SUSPICIOUS_NATS}: vLLM computes what the codes say, but the "
            "codes may be of no use"
        )
    if isinstance(proof["reference"], str):
        found.append(f"load proof: vLLM's results were not held to the codes: {proof['reference']}")
    return found
