"""Move a factor per channel from what a norm or layer puts out into what the next layers take in:
the block computes the same, its weights (and activations) are easier to round.
"""

# Shapes: O = outputs, I = inputs of the layers behind, which are the outputs of the source.

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from packhorse.quantize.calibration.statistics import Inputs
from packhorse.quantize.model.families import Family
from torch import Tensor, nn


def weight_of(block: nn.Module, name: str) -> Tensor:
    """A layer's or norm's weight itself, not a copy."""
    return block.get_parameter(f"{name}.weight").data


@dataclass(frozen=True)
class Pair:
    """A source and the layers it feeds."""

    source: str
    layers: tuple[str, ...]

    def weights(self, block: nn.Module) -> list[Tensor]:
        return [weight_of(block, name) for name in self.layers]


def pairs(block: nn.Module, family: Family) -> Iterator[Pair]:
    """The family's pairs that this block has and its shapes allow: behind grouped-query attention,
    v has fewer outputs than o has inputs.
    """
    names = {name for name, _ in block.named_parameters()}
    for source, layers in family.smoothing:
        if not names.issuperset(f"{name}.weight" for name in (source, *layers)):
            continue
        feeding = weight_of(block, source)
        taking = weight_of(block, layers[0])
        if feeding.shape[0] == taking.shape[1]:
            yield Pair(source, layers)


def apply(block: nn.Module, family: Family, pair: Pair, scales_I: Tensor) -> None:
    """Divide what the source puts out by scales_I and multiply it into the layers' inputs."""
    weight = weight_of(block, pair.source)
    if weight.ndim == 1:
        weight.add_(family.norm_offset).div_(scales_I).sub_(family.norm_offset)
    else:
        weight.div_(scales_I[:, None])
    bias = getattr(block.get_submodule(pair.source), "bias", None)
    if isinstance(bias, Tensor):
        bias.data.div_(scales_I)
    for name in pair.layers:
        weight_of(block, name).mul_(scales_I)


def search(
    block: nn.Module,
    family: Family,
    seen: dict[str, Inputs],
    best: Callable[[Sequence[Tensor], Inputs], Tensor | None],
    quantized: Collection[str],
    only: Collection[str] | None = None,
) -> list[str]:
    """For each pair, apply the scales that `best` finds for the layers' weights and inputs; with
    `only`, for those that feed one of these layers. Linear layers that are not `quantized` stay as
    they are. Returns the names of the layers for which it found none.
    """
    left: list[str] = []
    linears = {name for group in family.fused for name in group}
    for pair in pairs(block, family):
        if pair.layers[0] not in (quantized if only is None else only):
            continue
        if pair.source in linears and pair.source not in quantized:
            continue
        group = next(group[0] for group in family.fused if pair.layers[0] in group)
        scales_I = best(pair.weights(block), seen[group])
        if scales_I is None:
            left += pair.layers
        else:
            apply(block, family, pair, scales_I)
    return left


def normalized(scales_I: Tensor) -> Tensor:
    """Scales around 1, none of them zero or endless; ones where they cannot be used."""
    scales_I = scales_I.clamp_min(1e-4)
    scales_I = scales_I / (scales_I.max() * scales_I.min()).sqrt()
    return scales_I if scales_I.isfinite().all() else torch.ones_like(scales_I)
