"""Divergence of a checkpoint's predictions from its original's: KL divergence, agreement of the
likeliest tokens, and changes of the log-probabilities of a text's own tokens.

Predictions come from two sources. `between` runs both checkpoints in transformers, text by text,
over the whole vocabulary. `bucketed` takes two engines' log-probabilities of their likeliest
tokens, and gives a lower bound. Called by measure.py, sensitivity.py and engine_check.py.

Shapes: T = predictions (one less than a text's tokens), V = the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from packhorse.quantize.errors import BadInput
from packhorse.quantize.model import sizes
from packhorse.quantize.model.memory import free_memory_bytes
from packhorse.quantize.quality import dequantized
from packhorse.quantize.quality.evaluate import MAX_LENGTH

TOP = 5
BINS = 41
"""Odd, so that one bin has zero in its middle."""
WITHIN = 0.99
"""Share of the differences that lie within the histogram; the others are counted beside it."""
NARROWEST_NATS = 1e-4
"""Least half width of the histogram; smaller differences are float noise."""
SLICE_BYTES = 64 * 1024**2
"""Limit on float64 log-probabilities at a time: those of a long text over a large vocabulary take
gigabytes."""
MEMORY_MARGIN = 1.1
"""Factor on the estimate of `needed_bytes`, for activations and one layer during dequantization."""
NO_MASS = 1e-6
"""A smaller probability of a rest bucket is rounding of float32 log-probabilities."""


def kl_divergence(original_TV: Tensor, quantized_TV: Tensor) -> Tensor:
    """KL(original || quantized) in nats (T,), from natural log-probabilities."""
    likely_TV = original_TV.exp()
    # A token with probability 0 in the original adds nothing, whatever the other's probability is.
    return torch.where(likely_TV > 0, likely_TV * (original_TV - quantized_TV), 0.0).sum(-1)


@dataclass
class Tally:
    """Accumulates predictions. Keeps two floats per prediction, never logits."""

    kl: list[Tensor] = field(default_factory=list)
    """KL(original || quantized) in nats, float32, one tensor of (T,) for each text."""
    differences: list[Tensor] = field(default_factory=list)
    """Log-probability of the text's next token, quantized minus original, in nats; as above."""
    same_first: int = 0
    shared_top: int = 0
    top: int = TOP
    """TOP, or the size of a smaller vocabulary."""

    def add(self, original_TV: Tensor, quantized_TV: Tensor, next_T: Tensor) -> None:
        """Add one text: the logits of both models at the same positions, in any float dtype, and
        the token ids (int64) that follow these positions in the text.
        """
        vocabulary = original_TV.shape[1]
        self.top = min(TOP, vocabulary)
        kl, differences = [], []
        for rows in _slices(len(next_T), max(1, SLICE_BYTES // (8 * vocabulary))):
            # Sums of small differences over the vocabulary need the precision of float64.
            original = original_TV[rows].double().log_softmax(-1)
            quantized = quantized_TV[rows].double().log_softmax(-1)
            kl.append(kl_divergence(original, quantized).clamp_min(0.0).float())
            own = next_T[rows, None]
            differences.append((quantized.gather(1, own) - original.gather(1, own))[:, 0].float())
            first, second = original.topk(self.top).indices, quantized.topk(self.top).indices
            self.same_first += int((original.argmax(-1) == quantized.argmax(-1)).sum())
            self.shared_top += int((first[:, :, None] == second[:, None, :]).sum())
        self.kl.append(torch.cat(kl))
        self.differences.append(torch.cat(differences))

    def as_json(self) -> dict[str, Any]:
        """All figures, as in docs/quality-report.md. Raises BadInput when no text was added."""
        positions = sum(len(part) for part in self.kl)
        if not positions:
            raise BadInput(
                "The held-out text has no two tokens in a row; to compare predictions needs some."
            )
        kl, differences = torch.cat(self.kl).double(), torch.cat(self.differences).double()
        broken = int((~(kl.isfinite() & differences.isfinite())).sum())
        figures: dict[str, Any] = {
            "texts": len(self.kl), "positions": positions, "not_finite": broken,
            "top1_agreement": round(self.same_first / positions, 5),
            "top5_agreement": round(self.shared_top / positions / self.top, 5),
        }  # fmt: skip
        if broken:  # NaN has no mean, and JSON no NaN
            return figures
        ranked = kl.sort().values
        return figures | {
            "kl_mean": _digits(kl.mean().item()),
            "kl_mean_standard_error": _digits(self._standard_error()),
            "kl_p50": _digits(_percentile(ranked, 0.5)),
            "kl_p99": _digits(_percentile(ranked, 0.99)),
            "kl_max": _digits(ranked[-1].item()),
            "logprob_difference_mean": _digits(differences.mean().item()),
            "histogram": histogram(differences),
        }

    def _standard_error(self) -> float | None:
        """The standard error of the mean KL over the choice of texts, as predictions within one
        text are not independent. None for a single text. Source: the ratio estimator's standard
        error, Cochran, Sampling Techniques, 6.4.
        """
        texts, positions = len(self.kl), sum(len(part) for part in self.kl)
        if texts < 2:
            return None
        mean = sum(part.double().sum().item() for part in self.kl) / positions
        off = sum((part.double().sum().item() - mean * len(part)) ** 2 for part in self.kl)
        return math.sqrt(off * texts / (texts - 1)) / positions


def histogram(differences: Tensor) -> dict[str, Any]:
    """A histogram of differences in nats, with BINS bins of equal width around zero. Its range is
    that of the middle 99%.

    Returns BINS + 1 `edges`, BINS `counts`, and the numbers of differences `below` and `above`.
    """
    reach = _percentile(differences.abs().sort().values, WITHIN)
    # Rounded to two digits, so that nearly equal runs have the same edges.
    limit = max(float(f"{reach * 1.05:.1e}"), NARROWEST_NATS)
    edges = torch.linspace(-limit, limit, BINS + 1, dtype=torch.float64)
    inside = differences[(differences >= -limit) & (differences <= limit)].double()
    bins = torch.bucketize(inside, edges[1:-1], right=True)
    return {
        "edges": [_digits(edge) for edge in edges.tolist()],
        "counts": torch.bincount(bins, minlength=BINS).tolist(),
        "below": int((differences < -limit).sum()),
        "above": int((differences > limit).sum()),
    }


@torch.inference_mode()
def between(
    original: Path,
    quantized: Path,
    texts: Sequence[Sequence[int]],
    *,
    max_length: int = MAX_LENGTH,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Run both checkpoints on the token ids of each text, cut at max_length, and compare their
    predictions.

    Both models are in memory at once, in float32, because the change by 8-bit quantization is
    smaller than the rounding of bfloat16 sums. Where float32 does not fit, they are in the dtype of
    their configs; "computed_in" tells which. Where that does not fit either, the result is
    {"left_out": the missing memory}.

    Raises as `dequantized.load` does, and BadInput when no text has two tokens or the vocabularies
    differ.
    """
    rows = [list(ids[:max_length]) for ids in texts if len(ids[:max_length]) > 1]
    longest = max(map(len, rows), default=0)
    free = free_memory_bytes()
    needed = {
        half: needed_bytes([original, quantized], longest, half=half) for half in (False, True)
    }
    half = free is not None and free < needed[False]
    if free is not None and free < needed[half]:
        return {
            "left_out": f"predictions not compared: both models at once take {needed[half]:,} "
            f"bytes of memory and {free:,} are free here (a container's limit counts), "
            f"{needed[half] - free:,} too few; measure where there is more"
        }
    models = [dequantized.load(folder) for folder in (original, quantized)]
    if not half:
        models = [model.float() for model in models]
    tally = Tally()
    for ids in rows:
        row = torch.tensor([ids])
        first_TV, second_TV = (model(row, use_cache=False).logits[0, :-1] for model in models)
        if first_TV.shape != second_TV.shape:
            raise BadInput(
                f"{quantized} has a vocabulary of {second_TV.shape[1]}, {original} one of "
                f"{first_TV.shape[1]}; only a model and what was made of it can be compared."
            )
        tally.add(first_TV, second_TV, row[0, 1:])
        advance(1)
    computed_in = str(models[0].dtype).removeprefix("torch.")
    return {"computed_in": computed_in, **tally.as_json()}


def needed_bytes(folders: Sequence[Path], tokens: int, *, half: bool) -> int:
    """The memory of these folders' models, dequantized, and of their logits for one text of
    `tokens` tokens; with 2 bytes per number (`half`) or 4. An estimate from file headers.
    """
    per_number = 2 if half else 4
    numbers = 0
    for folder in folders:
        config = AutoConfig.from_pretrained(folder).get_text_config()
        numbers += sizes.of(folder)["parameters"] + tokens * int(config.vocab_size)
    return round(MEMORY_MARGIN * numbers * per_number) + 4 * SLICE_BYTES


def bucketed_kl(original: Mapping[int, float], quantized: Mapping[int, float]) -> float:
    """A lower bound of KL(original || quantized) in nats at one position, from the natural log-
    probabilities of each engine's likeliest tokens ({token id: logprob}).

    Tokens in both mappings are separate outcomes; all others share one rest bucket with probability
    1 - sum. Merging outcomes never raises a KL divergence (log sum inequality: Cover and Thomas,
    Elements of Information Theory, 2.7), so the full KL is at least this.
    """
    shared = original.keys() & quantized.keys()
    known = {token: math.exp(original[token]) for token in shared}
    kl = sum(mass * (original[token] - quantized[token]) for token, mass in known.items())
    rest = 1.0 - sum(known.values())
    other = 1.0 - sum(math.exp(quantized[token]) for token in shared)
    if rest > NO_MASS:
        # Rounding may make the other bucket too small; a larger one keeps the bound a lower bound.
        kl += rest * math.log(rest / max(other, NO_MASS))
    return max(kl, 0.0)


def bucketed(
    original: Sequence[Mapping[int, float]], quantized: Sequence[Mapping[int, float]]
) -> dict[str, Any]:
    """Figures of `bucketed_kl` over positions, which both sequences have in the same order; the
    share of positions with the same likeliest token; and the mean probability outside the rest
    bucket. {} without positions.
    """
    bounds, same, seen = [], 0, 0.0
    for one, other in zip(original, quantized, strict=True):
        bounds.append(bucketed_kl(one, other))
        same += max(one, key=one.__getitem__) == max(other, key=other.__getitem__)
        seen += sum(math.exp(one[token]) for token in one.keys() & other.keys())
    if not bounds:
        return {}
    ranked = torch.tensor(bounds, dtype=torch.float64).sort().values
    return {
        "positions": len(bounds),
        "kl_at_least_mean": _digits(ranked.mean().item()),
        "kl_at_least_p50": _digits(_percentile(ranked, 0.5)),
        "kl_at_least_p99": _digits(_percentile(ranked, 0.99)),
        "top1_agreement": round(same / len(bounds), 5),
        "seen_probability": round(seen / len(bounds), 5),
    }


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def _percentile(ranked: Tensor, share: float) -> float:
    """The smallest value that is not below this share of the ranked values."""
    return float(ranked[max(0, math.ceil(share * len(ranked)) - 1)])


def _digits(value: float | None) -> float | None:
    """Rounded to five significant digits, for the report."""
    return None if value is None else float(f"{value:.5g}")
