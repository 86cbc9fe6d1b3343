"""The verdict on a checkpoint, in plain words, from its report.

Each measure is compared with the limits below and gives a level; the worst level is the verdict's.
A measure that was not taken, or on too little data, never improves the verdict: without any measure
it is "not measured", and "as good as the original" needs all of REQUIRED. The limits are on the
page and in docs/quality-report.md, with their reasons. Called by report.py, view.py and page.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

REPORT_VERSION = 2
"""Version of the report's JSON, raised when a key changes its meaning or is removed. Reports of
version 1 have no such key."""

Level = Literal["as good as the original", "good", "look closer", "do not use", "not measured"]
Judgement = Level | Literal["too little to judge"]

# From the best to the worst.
LEVELS: tuple[Level, ...] = ("as good as the original", "good", "look closer", "do not use")


@dataclass(frozen=True)
class Limits:
    """The limits of a measure for each level. `rising`: higher values are better."""

    measure: str
    unit: str
    rising: bool
    as_good: float
    good: float
    usable: float
    """Beyond this limit, the level is "do not use"."""
    why: str

    def level(self, value: float) -> Level:
        for level, limit in zip(LEVELS, (self.as_good, self.good, self.usable), strict=False):
            if value >= limit if self.rising else value <= limit:
                return level
        return "do not use"  # NaN too, which compares as false


SCORE = Limits(
    "task score kept", "%", True, 0.99, 0.95, 0.90,
    "the share of the original's score; llm-compressor's own tests ask for 95%",
)  # fmt: skip
PERPLEXITY = Limits(
    "perplexity ratio", "", False, 1.01, 1.05, 1.20,
    "on the demo model rounding to 4 bits moves it by less than 1%, so alone it says little",
)  # fmt: skip
KL = Limits(
    "mean KL divergence", "nats", False, 0.01, 0.05, 0.30,
    "sees what perplexity averages away: on the demo model INT8 has 0.0002, GPTQ in 4 bits 0.003, "
    "rounding to 4 bits 0.013",
)  # fmt: skip
TOP1 = Limits(
    "same likeliest token", "%", True, 0.97, 0.90, 0.75,
    "how often greedy decoding takes the same step",
)  # fmt: skip
ENGINE = Limits(
    "change in vLLM", "nats", False, 0.1, 0.25, 1.0,
    "mean change of the prompts' own tokens, kernels' rounding included",
)  # fmt: skip
ALL_LIMITS = (SCORE, PERPLEXITY, KL, TOP1, ENGINE)

MIN_QUESTIONS = 100
"""With fewer questions, the standard error of a score of 90% is 3 points and more."""
MIN_PREDICTIONS = 1000
"""Fewer predicted tokens of held-out text are a handful of sentences."""
REQUIRED = ("task score", "KL divergence", "load check")
"""The measures that "as good as the original" needs."""

_SENTENCES: dict[Level, str] = {
    "as good as the original": "As good as the original in everything that was measured.",
    "good": "Good: losses are small, and few uses will notice them.",
    "look closer": "Look closer before you serve it: try it on the task it is for.",
    "do not use": "Do not use: too much of the original is lost.",
    "not measured": "Not measured: nothing in this report says how good the checkpoint is.",
}


@dataclass(frozen=True)
class Reason:
    """One measure: its result in words, and the level that follows."""

    measure: str
    found: str
    level: Judgement


@dataclass(frozen=True)
class Verdict:
    level: Level
    sentence: str
    reasons: tuple[Reason, ...]

    def as_json(self) -> dict[str, Any]:
        reasons = [asdict(reason) for reason in self.reasons]
        return {"level": self.level, "sentence": self.sentence, "reasons": reasons}


def verdict(report: dict[str, Any]) -> Verdict:
    """From a report's JSON (docs/quality-report.md); any key may be missing."""
    reasons = [*_score(report), *_text(report), *_divergence(report), *_load_check(report)]
    judged = {reason.level for reason in reasons}
    worst: Level = next((level for level in reversed(LEVELS) if level in judged), "not measured")
    # The engine's figures are of a few prompts: enough to lower the verdict, too few to raise it.
    evidence = [
        reason
        for reason in reasons
        if reason.level in LEVELS and reason.measure not in (ENGINE.measure, "load check")
    ]
    if not evidence and _rank(worst) < _rank("look closer"):
        return _of("not measured", reasons, ())
    missing = _missing(reasons)
    if missing and worst == LEVELS[0]:
        worst = "good"
    return _of(worst, reasons, missing)


def _of(level: Level, reasons: Sequence[Reason], missing: Sequence[str]) -> Verdict:
    sentence = _SENTENCES[level]
    if level in ("look closer", "do not use"):
        sentence += f" Because of: {', '.join(r.measure for r in reasons if r.level == level)}."
    if level == "not measured":
        sentence += " Measure it with --text and --eval."
    elif missing:
        sentence += f" Not measured: {', '.join(missing)}."
    return Verdict(level, sentence, tuple(reasons))


def _rank(level: Judgement) -> int:
    return LEVELS.index(level) if level in LEVELS else -1


def _missing(reasons: Sequence[Reason]) -> tuple[str, ...]:
    names = {SCORE.measure: "task score", KL.measure: "KL divergence"}
    found = {names.get(r.measure, r.measure) for r in reasons if r.level in LEVELS}
    return tuple(name for name in REQUIRED if name not in found)


def _score(report: dict[str, Any]) -> list[Reason]:
    before, after = (_quality(report, when).get("score") for when in ("before", "after"))
    if not before or not after:
        return [Reason(SCORE.measure, "no --eval file", "not measured")]
    questions = before["questions"]
    right = f"{after['exact_match']:.1%} right, {before['exact_match']:.1%} before, of {questions}"
    if not before["exact_match"]:
        return [Reason(SCORE.measure, f"the original answers none of {questions}", "not measured")]
    kept = after["exact_match"] / before["exact_match"]
    return [_judge(SCORE, kept, f"{kept:.1%} ({right})", enough=questions >= MIN_QUESTIONS)]


def _text(report: dict[str, Any]) -> list[Reason]:
    before, after = (_quality(report, when) for when in ("before", "after"))
    if "perplexity" not in before or "perplexity" not in after:
        return [Reason(PERPLEXITY.measure, "no --text file", "not measured")]
    ratio = after["perplexity"] / before["perplexity"]
    found = f"{ratio:.4f} ({before['perplexity']:.4g} to {after['perplexity']:.4g})"
    enough = after.get("predictions", 0) >= MIN_PREDICTIONS
    return [_judge(PERPLEXITY, ratio, found, enough=enough)]


def _divergence(report: dict[str, Any]) -> list[Reason]:
    divergence = (report.get("quality") or {}).get("distance")
    if not divergence:
        return [Reason(KL.measure, "no --text file", "not measured")]
    if "left_out" in divergence:
        return [Reason(KL.measure, divergence["left_out"], "not measured")]
    positions = divergence["positions"]
    if divergence["not_finite"]:
        found = f"no number at {divergence['not_finite']:,} of {positions:,} predictions"
        return [Reason(KL.measure, found, "do not use")]
    enough = positions >= MIN_PREDICTIONS
    same = divergence["top1_agreement"]
    found = f"{divergence['kl_mean']:.3g} nats over {positions:,} predictions"
    return [
        _judge(KL, divergence["kl_mean"], found, enough=enough),
        _judge(TOP1, same, f"at {same:.1%} of predictions", enough=enough),
    ]


def _load_check(report: dict[str, Any]) -> list[Reason]:
    load_check = report.get("proof")
    if not load_check:
        return [Reason("load check", "vLLM was not asked", "not measured")]
    if isinstance(load_check.get("reference"), str):  # the reason why the codes could not be run
        reasons = [Reason("load check", "loads in vLLM; not compared with the codes", "good")]
    else:
        reasons = [
            Reason("load check", "loads in vLLM, which computes what the codes say", LEVELS[0])
        ]
    if compared := load_check.get("compared"):
        moved = compared["logprob_difference_mean"]
        found = f"{moved:.3g} nats over {compared['prompt_tokens']:,} prompt tokens"
        reasons.append(_judge(ENGINE, moved, found, enough=True))
    return reasons


def _quality(report: dict[str, Any], when: str) -> dict[str, Any]:
    return (report.get("quality") or {}).get(when) or {}


def _judge(limits: Limits, value: float, found: str, *, enough: bool) -> Reason:
    """The reason for one measure. With little data (not `enough`), a bad value still lowers the
    verdict, and a good one does not raise it.
    """
    level = limits.level(value)
    if not enough and _rank(level) < _rank("look closer"):
        return Reason(limits.measure, found, "too little to judge")
    return Reason(limits.measure, found, level)
