"""Smoothing: divide the output channels of a norm or layer by factors, and multiply the input
channels of the layers that it feeds by the same factors. The block computes the same function, and
its weights and activations lose less when they are rounded. Used by awq.py and int8.py.
"""

# Shapes: O = outputs, I = inputs of the fed layers, which are the outputs of the source.

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packhorse.quantize.calibration.statistics import InputStatistics
from packhorse.quantize.model.families import Family


def weight_of(block: nn.Module, name: str) -> Tensor:
    """The weight of a layer or norm; not a copy."""
    return block.get_parameter(f"{name}.weight").data


@dataclass(frozen=True)
class Pair:
    """A source, which is a norm or a linear layer, and the linear layers that it feeds."""

    source: str
    layers: tuple[str, ...]

    def weights(self, block: nn.Module) -> list[Tensor]:
        return [weight_of(block, name) for name in self.layers]


def pairs(block: nn.Module, family: Family) -> Iterator[Pair]:
    """The family's pairs that this block has and whose shapes fit. With grouped-query attention,
    v_proj has fewer outputs than o_proj has inputs, and the pair is left out.
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
    """Divide the source's output channels by scales_I, and multiply the weights of the fed layers
    by scales_I along their inputs. In place.
    """
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
    statistics: dict[str, InputStatistics],
    best: Callable[[Sequence[Tensor], InputStatistics], Tensor | None],
    quantized: Collection[str],
    only: Collection[str] | None = None,
) -> list[str]:
    """Apply to each pair the factors that `best` returns for the fed layers' weights and input
    statistics. `statistics` has an entry for each fused group, by its first layer's name. With
    `only`, pairs that feed none of these layers are skipped. Linear layers that are not `quantized`
    are not changed. Returns the names of the layers for which `best` returned None.
    """
    left: list[str] = []
    linears = {name for group in family.fused for name in group}
    for pair in pairs(block, family):
        if pair.layers[0] not in (quantized if only is None else only):
            continue
        if pair.source in linears and pair.source not in quantized:
            continue
        group = next(group[0] for group in family.fused if pair.layers[0] in group)
        scales_I = best(pair.weights(block), statistics[group])
        if scales_I is None:
            left += pair.layers
        else:
            apply(block, family, pair, scales_I)
    return left


def normalized(scales_I: Tensor) -> Tensor:
    """The factors, bounded below and scaled so that their smallest and largest are reciprocals;
    ones when a factor is not finite.
    """
    scales_I = scales_I.clamp_min(1e-4)
    scales_I = scales_I / (scales_I.max() * scales_I.min()).sqrt()
    return scales_I if scales_I.isfinite().all() else torch.ones_like(scales_I)
