"""The verdict: limits, what is missing, what is too little."""

from __future__ import annotations

from typing import Any

import pytest

from packhorse.quantize.report.verdict import ALL_LIMITS, LEVELS, verdict


def report_of(
    *,
    score: float | None = 0.9,
    perplexity: float | None = 5.0,
    kl: float | None = 0.001,
    top1: float = 0.99,
    load_check: bool = True,
    moved: float = 0.01,
    questions: int = 400,
    predictions: int = 5000,
) -> dict[str, Any]:
    """What the verdict looks at. The original has a score of 0.9 and a perplexity of 5."""
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    if score is not None:
        for part, value in ((before, 0.9), (after, score)):
            part["score"] = {
                "exact_match": value, "questions": questions, "by_domain": {"all": value}
            }  # fmt: skip
    if perplexity is not None:
        before |= {"perplexity": 5.0, "predictions": predictions}
        after |= {"perplexity": perplexity, "predictions": predictions}
    apart = None
    if kl is not None:
        apart = {
            "computed_in": "float32", "texts": 9, "positions": predictions, "not_finite": 0,
            "top1_agreement": top1, "top5_agreement": 0.9, "kl_mean": kl, "kl_p50": kl / 9,
            "kl_p99": 9 * kl, "kl_mean_standard_error": kl / 10,
            "histogram": {"edges": [-1, -0.5, 0.5, 1], "counts": [3, 9, 0], "below": 1, "above": 2},
        }  # fmt: skip
    compared = {"answers_equal": 0.9, "prompt_tokens": 500, "logprob_difference_mean": moved}
    return {
        "quality": {"before": before, "after": after, "distance": apart, "measured_with": {}},
        "proof": {
            "engine": "vllm 0.32.0", "dtype": "bfloat16", "kernel": "W4A16 by Marlin",
            "reference": {"logprob_difference_mean": 0.01}, "compared": compared,
        } if load_check else None,
    }  # fmt: skip


NOTHING: dict[str, Any] = {"score": None, "perplexity": None, "kl": None}


@pytest.mark.parametrize(
    ("changed", "level"),
    [
        ({}, "as good as the original"),
        ({"score": 0.95}, "as good as the original"),
        ({"score": 0.9 * 0.98}, "good"),
        ({"score": 0.9 * 0.94}, "look closer"),
        ({"score": 0.9 * 0.89}, "do not use"),
        ({"perplexity": 5.2}, "good"),
        ({"perplexity": 5.5}, "look closer"),
        ({"perplexity": 6.5}, "do not use"),
        ({"perplexity": float("nan")}, "do not use"),
        ({"kl": 0.04}, "good"),
        ({"kl": 0.2}, "look closer"),
        ({"kl": 0.5}, "do not use"),
        ({"top1": 0.95}, "good"),
        ({"top1": 0.5}, "do not use"),
        ({"moved": 0.5}, "look closer"),
        ({"load_check": False}, "good"),
        ({"kl": None}, "good"),
        ({"score": None}, "good"),
        ({"perplexity": None}, "as good as the original"),
        # Nothing was measured, or on too little: never good, whatever the engine says.
        (NOTHING, "not measured"),
        (NOTHING | {"moved": 0.5}, "look closer"),
        ({"questions": 99, "perplexity": None, "kl": None}, "not measured"),
        ({"questions": 99, "score": 0.5}, "do not use"),
        ({"questions": 99}, "good"),
        ({"predictions": 999, "score": None}, "not measured"),
        ({"predictions": 999}, "good"),
    ],
)
def test_the_worst_measure_counts(changed: dict[str, Any], level: str) -> None:
    assert verdict(report_of(**changed)).level == level


@pytest.mark.parametrize("limits", ALL_LIMITS, ids=lambda limits: limits.measure)
def test_a_value_on_its_limit_still_has_the_level(limits: Any) -> None:
    on = (limits.as_good, limits.good, limits.usable)
    assert [limits.level(value) for value in on] == list(LEVELS[:3])
    worse = -1e-6 if limits.rising else 1e-6
    assert [limits.level(value + worse) for value in on] == list(LEVELS[1:])


def test_what_is_missing_is_named() -> None:
    found = verdict(report_of(kl=None, load_check=False))
    assert found.sentence.endswith("Not measured: KL divergence, load check.")
    assert found.level == "good"
    assert ("load check", "not measured") in {(r.measure, r.level) for r in found.reasons}
    little = verdict(report_of(questions=5, predictions=5, load_check=False))
    assert little.level == "not measured"
    assert {reason.level for reason in little.reasons} == {"too little to judge", "not measured"}
    assert verdict({}).level == "not measured"


def test_the_reason_is_named() -> None:
    found = verdict(report_of(perplexity=5.6, kl=0.1))
    assert "Because of: perplexity ratio, mean KL divergence." in found.sentence
    assert found.as_json()["reasons"][1] == {
        "measure": "perplexity ratio", "found": "1.1200 (5 to 5.6)", "level": "look closer"
    }  # fmt: skip


def test_a_model_that_computes_nan_or_cannot_be_compared_is_said_so() -> None:
    broken = report_of()
    broken["quality"]["distance"]["not_finite"] = 3
    assert verdict(broken).level == "do not use"
    left_out = report_of()
    left_out["quality"]["distance"] = {"left_out": "5 bytes too few"}
    assert verdict(left_out).level == "good"
    assert "5 bytes too few" in [reason.found for reason in verdict(left_out).reasons]
    hopeless = report_of()
    hopeless["quality"]["before"]["score"]["exact_match"] = 0.0
    assert verdict(hopeless).level == "good"
