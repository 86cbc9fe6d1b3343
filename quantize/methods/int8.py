"""INT8 (W8A8): 8-bit weights with one scale per output, inputs rounded to 8 bits per token while
serving. The 8-bit layout that vLLM runs on CPU and CUDA alike.

With calibration text: SmoothQuant's exponent is searched for each pair of a source and the
layers behind, so that outliers in the
inputs do not cost the other channels their resolution, and weights are rounded by GPTQ. Without:
plain rounding.
Source: SmoothQuant, arXiv:2211.10438.
"""

# Shapes: O = outputs, I = inputs, T = tokens.

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from packhorse.quantize.calibration.statistics import Inputs
from packhorse.quantize.methods import Rounded, gptq, smoothing
from packhorse.quantize.methods.error_compensation import correct
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import (
    Grid,
    Scheme,
    place,
    round_activations,
    round_to_nearest,
)
from torch import Tensor, nn

EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Int8:
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
        if inputs is None:
            return Rounded(round_to_nearest(weight_OI, self.scheme.grid, scale_dtype=scale_dtype))
        corrected_OI, note = correct(weight_OI, inputs)
        placement = place(corrected_OI, self.scheme.grid, scale_dtype=scale_dtype)
        return gptq.solve(corrected_OI, inputs.hessian_II, placement).noted(note)


def search_scales(weights: Sequence[Tensor], inputs: Inputs, grid: Grid) -> Tensor | None:
    """Factors for the layers' inputs, float32 (I,), or None where nothing beats leaving them."""
    sample_TI = inputs.sample_TI
    largest_I = torch.stack([w_OI.abs().amax(dim=0) for w_OI in weights]).amax(dim=0)
    best, least = None, _loss(weights, None, sample_TI, grid)
    for exponent in EXPONENTS:
        scales_I = smoothing.normalized(
            inputs.absmax_I.clamp_min(1e-5).pow(exponent)
            / largest_I.clamp_min(1e-5).pow(1 - exponent)
        )
        loss = _loss(weights, scales_I, sample_TI, grid)
        if loss < least:
            best, least = scales_I, loss
    return best


def _loss(
    weights: Sequence[Tensor], scales_I: Tensor | None, sample_TI: Tensor, grid: Grid
) -> float:
    """The square change of the layers' outputs on the sample, with both sides rounded."""
    total = 0.0
    x_TI = round_activations(sample_TI if scales_I is None else sample_TI / scales_I)
    for weight_OI in weights:
        scaled_OI = weight_OI if scales_I is None else weight_OI * scales_I
        rounded_OI = round_to_nearest(scaled_OI, grid, scale_dtype=torch.float32).dequantize()
        total += (x_TI @ rounded_OI.T - sample_TI @ weight_OI.T).square().sum().item()
    return total
