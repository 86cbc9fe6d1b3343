"""How far a checkpoint's predictions are from its original's: KL divergence, agreement, and what
became of the log-probabilities of the text's own tokens.

Two sources of predictions. `between` runs both checkpoints in transformers, text by text, and sees
the whole vocabulary. `bucketed` takes what two engines say of their likeliest tokens, and gives a
lower bound. Called by `report` and `verify`.

Shapes: T = predictions (one less than a text's tokens), V = the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from packhorse.quantize.errors import BadInput
from packhorse.quantize.model import sizes
from packhorse.quantize.model.memory import free_memory_bytes
from packhorse.quantize.quality import dequantized
from packhorse.quantize.quality.evaluate import MAX_LENGTH
from torch import Tensor
from transformers import AutoConfig

TOP = 5
BINS = 41
"""Odd, so that one bin has zero in its middle."""
WITHIN = 0.99
"""Share of the differences that lie inside the histogram; the rest is counted beside it."""
NARROWEST_NATS = 1e-4
"""Half the histogram's width, at least: below it is float noise."""
SLICE_BYTES = 64 * 1024**2
"""Of float64 log-probabilities at a time: a long text of a large vocabulary takes gigabytes."""
MEMORY_MARGIN = 1.1
"""Over the arithmetic of `needed_bytes`: activations, and one layer that is being dequantized."""
NO_MASS = 1e-6
"""Less probability than this in a rest bucket is the rounding of float32 log-probabilities."""


def divergence(original_TV: Tensor, made_TV: Tensor) -> Tensor:
    """KL(original || made) in nats (T,), from natural log-probabilities."""
    likely_TV = original_TV.exp()
    # A token that the original rules out adds nothing, whatever the other makes of it.
    return torch.where(likely_TV > 0, likely_TV * (original_TV - made_TV), 0.0).sum(-1)


@dataclass
class Tally:
    """Adds up predictions. Keeps two floats a prediction, never logits."""

    kl: list[Tensor] = field(default_factory=list)
    """KL(original || made) in nats, float32, one tensor of (T,) for each text."""
    differences: list[Tensor] = field(default_factory=list)
    """Log-probability of the text's next token, made minus original, in nats; as above."""
    same_first: int = 0
    shared_top: int = 0
    top: int = TOP
    """Less in a smaller vocabulary."""

    def add(self, original_TV: Tensor, made_TV: Tensor, next_T: Tensor) -> None:
        """One text: the logits of both at the same positions, any float dtype, and the token ids
        (int64) that really come next.
        """
        vocabulary = original_TV.shape[1]
        self.top = min(TOP, vocabulary)
        kl, differences = [], []
        for rows in _slices(len(next_T), max(1, SLICE_BYTES // (8 * vocabulary))):
            # float64: sums over the vocabulary of small differences need the digits.
            original = original_TV[rows].double().log_softmax(-1)
            made = made_TV[rows].double().log_softmax(-1)
            kl.append(divergence(original, made).clamp_min(0.0).float())
            own = next_T[rows, None]
            differences.append((made.gather(1, own) - original.gather(1, own))[:, 0].float())
            first, second = original.topk(self.top).indices, made.topk(self.top).indices
            self.same_first += int((original.argmax(-1) == made.argmax(-1)).sum())
            self.shared_top += int((first[:, :, None] == second[:, None, :]).sum())
        self.kl.append(torch.cat(kl))
        self.differences.append(torch.cat(differences))

    def as_json(self) -> dict[str, Any]:
        """All figures; see docs/quality-report.md. Raises BadInput when nothing was added."""
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
        """Of the mean KL, were other texts drawn: predictions within one text are not independent.
        None of a single text. Source: the ratio estimator's, Cochran, Sampling Techniques, 6.4.
        """
        texts, positions = len(self.kl), sum(len(part) for part in self.kl)
        if texts < 2:
            return None
        mean = sum(part.double().sum().item() for part in self.kl) / positions
        off = sum((part.double().sum().item() - mean * len(part)) ** 2 for part in self.kl)
        return math.sqrt(off * texts / (texts - 1)) / positions


def histogram(differences: Tensor) -> dict[str, Any]:
    """BINS bins of equal width around zero, as wide as the middle 99% of the differences (nats).

    Returns `edges` (BINS + 1 of them), `counts` (BINS), and how many lie `below` and `above`.
    """
    reach = _percentile(differences.abs().sort().values, WITHIN)
    # Two digits and no more, so that nearly equal runs share their edges.
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
    made: Path,
    texts: Sequence[Sequence[int]],
    *,
    max_length: int = MAX_LENGTH,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Run both checkpoints over the token ids of each text (cut at max_length) and tell them apart.

    Both are in memory at once, in float32, since what 8 bits change is less than the rounding of
    bfloat16 sums; in the dtype of their configs where float32 does not fit ("computed_in" says
    which). Where that does not fit either: {"left_out": what is missing, and how much}.

    Raises as `simulate.load` does, and BadInput when no text has two tokens or the vocabularies
    differ.
    """
    rows = [list(ids[:max_length]) for ids in texts if len(ids[:max_length]) > 1]
    longest = max(map(len, rows), default=0)
    free = free_memory_bytes()
    needed = {half: needed_bytes([original, made], longest, half=half) for half in (False, True)}
    half = free is not None and free < needed[False]
    if free is not None and free < needed[half]:
        return {
            "left_out": f"predictions not compared: both models at once take {needed[half]:,} "
            f"bytes of memory and {free:,} are free here (a container's limit counts), "
            f"{needed[half] - free:,} too few; measure where there is more"
        }
    models = [dequantized.load(folder) for folder in (original, made)]
    if not half:
        models = [model.float() for model in models]
    tally = Tally()
    for ids in rows:
        row = torch.tensor([ids])
        first_TV, second_TV = (model(row, use_cache=False).logits[0, :-1] for model in models)
        if first_TV.shape != second_TV.shape:
            raise BadInput(
                f"{made} has a vocabulary of {second_TV.shape[1]}, {original} one of "
                f"{first_TV.shape[1]}; only a model and what was made of it can be compared."
            )
        tally.add(first_TV, second_TV, row[0, 1:])
        advance(1)
    computed_in = str(models[0].dtype).removeprefix("torch.")
    return {"computed_in": computed_in, **tally.as_json()}


def needed_bytes(folders: Sequence[Path], tokens: int, *, half: bool) -> int:
    """Memory that the models of these folders take dequantized, and their logits of one text of so
    many tokens; in two bytes a number (`half`) or four. An estimate from headers.
    """
    per_number = 2 if half else 4
    numbers = 0
    for folder in folders:
        config = AutoConfig.from_pretrained(folder).get_text_config()
        numbers += sizes.of(folder)["parameters"] + tokens * int(config.vocab_size)
    return round(MEMORY_MARGIN * numbers * per_number) + 4 * SLICE_BYTES


def bucketed_kl(original: Mapping[int, float], made: Mapping[int, float]) -> float:
    """A lower bound of KL(original || made) in nats at one position, from the natural log-
    probabilities of each engine's likeliest tokens ({token id: logprob}).

    Tokens that both name are kept apart, all others share one rest bucket with probability 1 - sum.
    Pooling outcomes never raises a KL divergence (the log sum inequality: Cover and Thomas,
    Elements of Information Theory, 2.7), so the full one is at least this.
    """
    shared = original.keys() & made.keys()
    known = {token: math.exp(original[token]) for token in shared}
    kl = sum(mass * (original[token] - made[token]) for token, mass in known.items())
    rest = 1.0 - sum(known.values())
    other = 1.0 - sum(math.exp(made[token]) for token in shared)
    if rest > NO_MASS:
        # Rounding may leave the other bucket less than it holds; more of it keeps the bound low.
        kl += rest * math.log(rest / max(other, NO_MASS))
    return max(kl, 0.0)


def bucketed(
    original: Sequence[Mapping[int, float]], made: Sequence[Mapping[int, float]]
) -> dict[str, Any]:
    """`bucketed_kl` over positions, in the order of both; with how often the likeliest token is the
    same, and the mean probability that is not in the rest bucket. {} for no positions.
    """
    bounds, same, seen = [], 0, 0.0
    for one, other in zip(original, made, strict=True):
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
    """The smallest value that at least this share of all is not above."""
    return float(ranked[max(0, math.ceil(share * len(ranked)) - 1)])


def _digits(value: float | None) -> float | None:
    """Five digits: what is smaller is no figure of a report."""
    return None if value is None else float(f"{value:.5g}")
