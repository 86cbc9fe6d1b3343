"""INT8 (W8A8): 8-bit weights with one scale per output; the engine rounds inputs to 8 bits with one
scale per token. vLLM runs this scheme on CPUs and on GPUs.

With calibration text, the method searches SmoothQuant's exponent for each pair of a source and the
layers that it feeds, so that outlier channels do not take the resolution of the others, and rounds
the weights with GPTQ. Without calibration text it rounds to nearest.
Source: SmoothQuant, arXiv:2211.10438.
"""

# Shapes: O = outputs, I = inputs, T = tokens.

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packhorse.quantize.calibration.statistics import InputStatistics
from packhorse.quantize.methods import QuantizationResult, gptq, smoothing
from packhorse.quantize.methods.error_compensation import compensate
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import (
    QuantizationArgs,
    Scheme,
    minmax_parameters,
    round_activations,
    round_to_nearest,
)

EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Int8:
    scheme: Scheme
    calibrated: bool = True

    def prepare(
        self,
        block: nn.Module,
        family: Family,
        statistics: Callable[[], dict[str, InputStatistics]],
        quantized: Collection[str],
    ) -> list[str]:
        args = self.scheme.weights
        return smoothing.search(
            block,
            family,
            statistics(),
            lambda weights, given: search_scales(weights, given, args),
            quantized,
        )

    def quantize(
        self, weight_OI: Tensor, statistics: InputStatistics | None, scale_dtype: torch.dtype
    ) -> QuantizationResult:
        if statistics is None:
            return QuantizationResult(
                round_to_nearest(weight_OI, self.scheme.weights, scale_dtype=scale_dtype)
            )
        compensated_OI, note = compensate(weight_OI, statistics)
        parameters = minmax_parameters(compensated_OI, self.scheme.weights, scale_dtype=scale_dtype)
        return gptq.solve(compensated_OI, statistics.hessian_II, parameters).with_note(note)


def search_scales(
    weights: Sequence[Tensor], statistics: InputStatistics, args: QuantizationArgs
) -> Tensor | None:
    """The factors for the layers' input channels, float32 (I,); None when ones lose least."""
    sample_TI = statistics.sample_TI
    largest_I = torch.stack([w_OI.abs().amax(dim=0) for w_OI in weights]).amax(dim=0)
    best, least = None, _loss(weights, None, sample_TI, args)
    for exponent in EXPONENTS:
        scales_I = smoothing.normalized(
            statistics.absmax_I.clamp_min(1e-5).pow(exponent)
            / largest_I.clamp_min(1e-5).pow(1 - exponent)
        )
        loss = _loss(weights, scales_I, sample_TI, args)
        if loss < least:
            best, least = scales_I, loss
    return best


def _loss(
    weights: Sequence[Tensor], scales_I: Tensor | None, sample_TI: Tensor, args: QuantizationArgs
) -> float:
    """The squared error of the layers' outputs on the sample, with weights and inputs rounded."""
    total = 0.0
    x_TI = round_activations(sample_TI if scales_I is None else sample_TI / scales_I)
    for weight_OI in weights:
        scaled_OI = weight_OI if scales_I is None else weight_OI * scales_I
        rounded_OI = round_to_nearest(scaled_OI, args, scale_dtype=torch.float32).dequantize()
        total += (x_TI @ rounded_OI.T - sample_TI @ weight_OI.T).square().sum().item()
    return total
