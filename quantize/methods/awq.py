"""AWQ: scale up the channels whose inputs are large before rounding, and take the scale back in
what feeds them.

For each pair of a source and the layers behind it, the exponent that loses least on the
calibration inputs is searched; no scaling is always a candidate, and stays where nothing is better.
Then the weight is corrected for the errors of the layers before it (correction.py; not part of the
paper), each group's range is clipped where that loses less (`search_placement`), and rounded.
Source: AWQ, arXiv:2306.00978. The loss is computed from the mean of x x^T instead of from the
inputs themselves: for a linear layer both are the same number.
"""

# Shapes: O = outputs, I = inputs.

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from packhorse.quantize.calibration.statistics import Inputs
from packhorse.quantize.methods import Rounded, smoothing
from packhorse.quantize.methods.error_compensation import correct
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import Grid, Scheme, round_to_nearest, search_placement
from torch import Tensor, nn

EXPONENTS = [step / 20 for step in range(1, 21)]


@dataclass(frozen=True)
class Awq:
    scheme: Scheme
    calibrated: bool = True

    def prepare(
        self,
        block: nn.Module,
        family: Family,
        inputs: Callable[[], dict[str, Inputs]],
        quantized: Collection[str],
    ) -> list[str]:
        grid = self.scheme.grid
        return smoothing.search(
            block,
            family,
            inputs(),
            lambda weights, seen: search_scales(weights, seen, grid),
            quantized,
        )

    def quantize(
        self, weight_OI: Tensor, inputs: Inputs | None, scale_dtype: torch.dtype
    ) -> Rounded:
        assert inputs is not None
        corrected_OI, note = correct(weight_OI, inputs)
        importance_I = inputs.hessian_II.diagonal()
        placement = search_placement(
            corrected_OI, self.scheme.grid, importance_I, scale_dtype=scale_dtype
        )
        return Rounded(placement.round(corrected_OI), note)


def search_scales(weights: Sequence[Tensor], inputs: Inputs, grid: Grid) -> Tensor | None:
    """Factors for the layers' inputs, float32 (I,), or None where nothing beats leaving them."""
    magnitude_I = inputs.absmean_I
    weight_I = torch.stack([_relative_magnitude(w_OI, grid) for w_OI in weights]).mean(dim=0)
    best, least = None, _loss(weights, None, inputs.hessian_II, grid)
    for exponent in EXPONENTS:
        scales_I = smoothing.normalized(
            magnitude_I.pow(exponent) / (weight_I.pow(1 - exponent) + 1e-4)
        )
        loss = _loss(weights, scales_I, inputs.hessian_II, grid)
        if loss < least:
            best, least = scales_I, loss
    return best


def _relative_magnitude(weight_OI: Tensor, grid: Grid) -> Tensor:
    """How large each input's weights are, on average, against their groups' largest: (I,)."""
    outputs, inputs = weight_OI.shape
    grouped = weight_OI.abs().reshape(outputs, -1, grid.group_size or inputs)
    return (
        (grouped / grouped.amax(dim=2, keepdim=True).clamp_min(1e-8))
        .reshape(outputs, inputs)
        .mean(dim=0)
    )


def _loss(
    weights: Sequence[Tensor], scales_I: Tensor | None, hessian_II: Tensor, grid: Grid
) -> float:
    """The mean square change of the layers' outputs, summed over them."""
    total = 0.0
    for weight_OI in weights:
        scaled_OI = weight_OI if scales_I is None else weight_OI * scales_I
        rounded_OI = round_to_nearest(scaled_OI, grid, scale_dtype=torch.float32).dequantize()
        if scales_I is not None:
            rounded_OI /= scales_I
        error_OI = rounded_OI - weight_OI
        total += ((error_OI @ hessian_II) * error_OI).sum().item()
    return total
