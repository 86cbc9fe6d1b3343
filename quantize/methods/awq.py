"""AWQ: before rounding, multiply the input channels with large activations by a factor, and divide
the output of the preceding norm or layer by the same factor.

For each pair of a source and the layers that it feeds, the method searches the exponent of the
factors with the least loss on the calibration inputs. Factors of 1 are always a candidate. Then the
method compensates the weight for the errors of earlier layers (error_compensation.py; not part of
the paper), clips each group's range where clipping loses less (`search_parameters`), and rounds.
Source: AWQ, arXiv:2306.00978. The loss is computed from the mean of x x^T and not from the inputs
themselves: for a linear layer both give the same number.
"""

# Shapes: O = outputs, I = inputs.

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packhorse.quantize.calibration.statistics import InputStatistics
from packhorse.quantize.methods import QuantizationResult, smoothing
from packhorse.quantize.methods.error_compensation import compensate
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import (
    QuantizationArgs,
    Scheme,
    round_to_nearest,
    search_parameters,
)

EXPONENTS = [step / 20 for step in range(1, 21)]


@dataclass(frozen=True)
class Awq:
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
        assert statistics is not None
        compensated_OI, note = compensate(weight_OI, statistics)
        importance_I = statistics.hessian_II.diagonal()
        parameters = search_parameters(
            compensated_OI, self.scheme.weights, importance_I, scale_dtype=scale_dtype
        )
        return QuantizationResult(parameters.round(compensated_OI), note)


def search_scales(
    weights: Sequence[Tensor], statistics: InputStatistics, args: QuantizationArgs
) -> Tensor | None:
    """The factors for the layers' input channels, float32 (I,); None when ones lose least."""
    magnitude_I = statistics.absmean_I
    weight_I = torch.stack([_relative_magnitude(w_OI, args) for w_OI in weights]).mean(dim=0)
    best, least = None, _loss(weights, None, statistics.hessian_II, args)
    for exponent in EXPONENTS:
        scales_I = smoothing.normalized(
            magnitude_I.pow(exponent) / (weight_I.pow(1 - exponent) + 1e-4)
        )
        loss = _loss(weights, scales_I, statistics.hessian_II, args)
        if loss < least:
            best, least = scales_I, loss
    return best


def _relative_magnitude(weight_OI: Tensor, args: QuantizationArgs) -> Tensor:
    """The mean over outputs of |weight| over the largest |weight| in its group: (I,)."""
    outputs, inputs = weight_OI.shape
    grouped = weight_OI.abs().reshape(outputs, -1, args.group_size or inputs)
    return (
        (grouped / grouped.amax(dim=2, keepdim=True).clamp_min(1e-8))
        .reshape(outputs, inputs)
        .mean(dim=0)
    )


def _loss(
    weights: Sequence[Tensor], scales_I: Tensor | None, hessian_II: Tensor, args: QuantizationArgs
) -> float:
    """The mean squared error of each layer's outputs, summed over outputs and layers."""
    total = 0.0
    for weight_OI in weights:
        scaled_OI = weight_OI if scales_I is None else weight_OI * scales_I
        rounded_OI = round_to_nearest(scaled_OI, args, scale_dtype=torch.float32).dequantize()
        if scales_I is not None:
            rounded_OI /= scales_I
        error_OI = rounded_OI - weight_OI
        total += ((error_OI @ hessian_II) * error_OI).sum().item()
    return total
