"""Divergence of predictions: against slow and obvious versions, and on tiny checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packhorse.quantize.errors import BadInput
from packhorse.quantize.numerics.grid import QuantizationArgs, Scheme
from packhorse.quantize.quality import divergence
from packhorse.quantize.quality.divergence import (
    BINS,
    Tally,
    between,
    bucketed,
    bucketed_kl,
    histogram,
)
from tests.unit.quantize.test_dequantized import tiny_llama, write_checkpoint

TEXTS = [list(range(1, 40)), list(range(80, 20, -2)), [3]]


def slow_kl(original: list[float], made: list[float]) -> float:
    """Of two rows of logits, term by term."""
    p, q = (torch.tensor(row, dtype=torch.float64).softmax(0).tolist() for row in (original, made))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_figures_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "SLICE_BYTES", 8 * 9 * 2)  # two positions at a time
    torch.manual_seed(0)
    original_TV, noise_TV = torch.randn(7, 9), torch.randn(7, 9)
    made_TV, next_T = original_TV + noise_TV, torch.randint(9, (7,))
    tally = Tally()
    tally.add(original_TV[:3], made_TV[:3], next_T[:3])
    tally.add(original_TV[3:], made_TV[3:], next_T[3:])
    found = tally.as_json()
    pairs = list(zip(original_TV, made_TV, strict=True))
    kl = sorted(slow_kl(one.tolist(), other.tolist()) for one, other in pairs)
    assert found["kl_mean"] == pytest.approx(sum(kl) / 7, rel=1e-4)
    assert found["kl_p50"] == pytest.approx(kl[3], rel=1e-4)
    assert found["kl_p99"] == found["kl_max"] == pytest.approx(kl[6], rel=1e-4)
    same = sum(int(one.argmax()) == int(other.argmax()) for one, other in pairs)
    assert found["top1_agreement"] == pytest.approx(same / 7, abs=1e-5)
    shared = sum(
        len(set(one.topk(5).indices.tolist()) & set(other.topk(5).indices.tolist()))
        for one, other in pairs
    )
    assert found["top5_agreement"] == pytest.approx(shared / 7 / 5, abs=1e-5)
    moved = made_TV.log_softmax(1) - original_TV.log_softmax(1)
    mean = moved.gather(1, next_T[:, None]).mean().item()
    assert found["logprob_difference_mean"] == pytest.approx(mean, rel=1e-3)
    assert (found["positions"], found["texts"], found["not_finite"]) == (7, 2, 0)


def test_a_token_that_is_ruled_out_adds_nothing_and_nan_is_counted() -> None:
    masked_TV = torch.tensor([[0.0, 1.0, -torch.inf]])
    tally = Tally()
    tally.add(masked_TV, masked_TV, torch.tensor([1]))
    assert tally.as_json()["kl_mean"] == 0
    tally.add(masked_TV, torch.full((1, 3), torch.nan), torch.tensor([1]))
    found = tally.as_json()
    assert found["not_finite"] == 1
    assert "kl_mean" not in found


def test_every_difference_is_in_the_histogram_or_beside_it() -> None:
    torch.manual_seed(0)
    differences = torch.cat([torch.randn(1000), torch.tensor([-30.0, 40.0, 0.0])])
    found = histogram(differences)
    assert len(found["counts"]) == BINS
    assert len(found["edges"]) == BINS + 1
    assert found["edges"][0] == -found["edges"][-1]
    assert sum(found["counts"]) + found["below"] + found["above"] == 1003
    assert min(found["below"], found["above"]) >= 1
    for number, count in enumerate(found["counts"]):
        left, right = found["edges"][number : number + 2]
        assert count == int(((differences >= left) & (differences < right)).sum())
    assert histogram(torch.zeros(5))["counts"][BINS // 2] == 5


def test_equal_checkpoints_have_no_divergence_and_coarser_ones_more(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "original")
    for bits in (4, 8):
        write_checkpoint(
            tmp_path / f"{bits}", "compressed-tensors", Scheme(QuantizationArgs(bits, 32))
        )
    steps: list[int] = []
    same = between(tmp_path / "original", tmp_path / "original", TEXTS, advance=steps.append)
    assert (same["kl_mean"], same["top1_agreement"], same["top5_agreement"]) == (0, 1, 1)
    assert same["positions"] == 38 + 29
    assert same["computed_in"] == "float32"
    assert steps == [1, 1]
    kl = [between(tmp_path / "original", tmp_path / name, TEXTS)["kl_mean"] for name in "84"]
    assert 0 < kl[0] < kl[1] / 10


def test_without_the_memory_it_is_left_out_with_the_number_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    needed = divergence.needed_bytes([tmp_path, tmp_path], 39, half=True)
    monkeypatch.setattr(divergence, "free_memory_bytes", lambda: needed - 5)
    left_out = between(tmp_path, tmp_path, TEXTS)["left_out"]
    assert f"take {needed:,} bytes of memory and {needed - 5:,} are free here" in left_out
    assert "5 too few" in left_out
    monkeypatch.setattr(divergence, "free_memory_bytes", lambda: None)
    assert "kl_mean" in between(tmp_path, tmp_path, TEXTS)
    with pytest.raises(BadInput, match="no two tokens"):
        between(tmp_path, tmp_path, [[1]])


@given(st.integers(0, 2**32), st.floats(0, 8), st.integers(1, 30))
@settings(deadline=None, max_examples=60)
def test_the_bucketed_kl_is_never_above_the_full_one(seed: int, noise: float, top: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    original = 3 * torch.randn(30, generator=generator)
    made = original + noise * torch.randn(30, generator=generator)
    said = []
    for logits in (original, made):
        logprobs = logits.double().log_softmax(0)
        said.append({int(token): float(logprobs[token]) for token in logits.topk(top).indices})
    # Rounding in the rest bucket of 1e-6, times log(1e6).
    assert 0 <= bucketed_kl(*said) <= slow_kl(original.tolist(), made.tolist()) + 2e-5
    assert bucketed_kl(said[0], said[0]) == 0


def test_bucketed_sums_up_positions() -> None:
    sure, unsure = {7: math.log(0.9), 8: math.log(0.05)}, {7: math.log(0.4), 9: math.log(0.5)}
    found = bucketed([sure, sure], [sure, unsure])
    expected = 0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.1 / 0.6)
    assert found["kl_at_least_mean"] == pytest.approx(expected / 2, rel=1e-4)
    assert found["top1_agreement"] == 0.5
    assert found["seen_probability"] == pytest.approx((0.95 + 0.9) / 2)
    assert bucketed([], []) == {}
