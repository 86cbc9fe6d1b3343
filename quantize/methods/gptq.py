"""GPTQ: round a weight column by column, and move each column's rounding error onto the columns
that are not rounded yet.

First the weight is compensated for the errors of earlier layers (error_compensation.py). Then the
scales are fixed ("static groups"), by a search that weights each input by its mean square in the
calibration data. Then the columns are rounded in the order of falling importance ("act-order");
with static groups this order needs no g_idx on disk.

Source: GPTQ, arXiv:2210.17323. Its algorithm 1 distributes each error with a Cholesky factor of the
inverse Hessian. A factor of the Hessian itself gives the same codes when columns are taken from its
end (arXiv:2507.18553), and no inverse is needed. The tests compare the result with a version that
solves the least-squares problem again after every column.
"""

# Shapes: O = outputs, I = inputs, G = groups along I, B = columns of a block.

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packhorse.quantize.calibration.statistics import InputStatistics
from packhorse.quantize.methods import QuantizationResult
from packhorse.quantize.methods.error_compensation import compensate
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.cholesky import factor_
from packhorse.quantize.numerics.grid import (
    QuantizationParameters,
    QuantizedWeight,
    Scheme,
    search_parameters,
)

BLOCK = 128  # columns that receive the errors of all earlier blocks in one matrix product
# Shares of the mean diagonal, tried in order until the factorization succeeds.
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Gptq:
    scheme: Scheme
    calibrated: bool = True

    def prepare(
        self,
        block: nn.Module,
        family: Family,
        statistics: Callable[[], dict[str, InputStatistics]],
        quantized: Collection[str],
    ) -> list[str]:
        return []

    def quantize(
        self, weight_OI: Tensor, statistics: InputStatistics | None, scale_dtype: torch.dtype
    ) -> QuantizationResult:
        assert statistics is not None
        compensated_OI, note = compensate(weight_OI, statistics)
        parameters = search_parameters(
            compensated_OI,
            self.scheme.weights,
            statistics.hessian_II.diagonal(),
            scale_dtype=scale_dtype,
        )
        return solve(compensated_OI, statistics.hessian_II, parameters).with_note(note)


def solve(
    weight_OI: Tensor, hessian_II: Tensor, parameters: QuantizationParameters
) -> QuantizationResult:
    """Quantize a weight with fixed parameters, so that the layer's output changes least on inputs
    with this Hessian.

    weight_OI is float32 or a half type, hessian_II the mean of x x^T in float32; neither is
    changed. No row's output error is above that of rounding to nearest. When no damping makes the
    Hessian positive definite, the weight is rounded to nearest, and the note says so.
    """
    diagonal_I = hessian_II.diagonal()
    order_I = diagonal_I.argsort(descending=True, stable=True).flip(0)
    mean = diagonal_I.mean().item()
    for damping in DAMPING:
        # An input that is always 0 has no part in the error. Its diagonal must keep the matrix
        # invertible without being large beside the others; added_I is subtracted again at the end.
        added_I = torch.where(diagonal_I == 0, 1.0, damping) * (mean if mean > 0 else 1.0)
        damped_II = hessian_II[order_I[:, None], order_I]
        damped_II.diagonal().add_(added_I[order_I])
        lower_II = factor_(damped_II)
        if lower_II is not None:
            note = None if damping == DAMPING[0] else f"damped by {damping} of the mean diagonal"
            quantized, changed_O = _round_columns(weight_OI, parameters, order_I, lower_II, added_I)
            return QuantizationResult(
                _better_rows(weight_OI, hessian_II, parameters, quantized, changed_O), note
            )
    return QuantizationResult(
        parameters.round(weight_OI), "rounded to nearest: Hessian not invertible"
    )


def _round_columns(
    weight_OI: Tensor,
    parameters: QuantizationParameters,
    order_I: Tensor,
    lower_II: Tensor,
    added_I: Tensor,
) -> tuple[QuantizedWeight, Tensor]:
    """Round the columns in order_I, from its end to its beginning.

    lower_II is the Cholesky factor of the Hessian in that order, with added_I on its diagonal. Each
    column's target is its weight plus the errors that it receives: those of earlier blocks in one
    matrix product, those of its own block one by one. Returns the quantized weight and the mean
    squared change of each output (O,).
    """
    args, inputs = parameters.args, weight_OI.shape[1]
    # Columns become rows, which are contiguous in memory.
    wanted_IO = weight_OI.float().T[order_I].contiguous()
    scales_GO = parameters.scales_OG.float().T.contiguous()
    zeros_GO = None if parameters.zeros_OG is None else parameters.zeros_OG.float().T.contiguous()
    groups = (order_I // (inputs // len(scales_GO))).tolist()
    upper_II = lower_II.T
    diagonal_I1 = upper_II.diagonal().unsqueeze(1)
    lost_IO = torch.empty_like(wanted_IO)
    codes_IO = torch.empty(wanted_IO.shape, dtype=args.code_dtype, device=wanted_IO.device)
    changed_O = torch.zeros_like(wanted_IO[0])
    for end in range(inputs, 0, -BLOCK):
        start = max(0, end - BLOCK)
        owed_BO = (upper_II[start:end, end:] @ lost_IO[end:]).div_(diagonal_I1[start:end])
        target_BO = owed_BO.add_(wanted_IO[start:end])
        # Row j: the share of column j's error that each column before it receives.
        shares_BB = (upper_II[start:end, start:end] / diagonal_I1[start:end]).T.contiguous()
        for column in reversed(range(end - start)):
            place = start + column
            scale_O = scales_GO[groups[place]]
            steps_O = target_BO[column] / scale_O
            if zeros_GO is None:
                code_O = steps_O.round_().clamp_(args.low, args.high)
                rounded_O = code_O * scale_O
            else:
                zero_O = zeros_GO[groups[place]]
                code_O = steps_O.add_(zero_O).round_().clamp_(args.low, args.high)
                rounded_O = (code_O - zero_O) * scale_O
            codes_IO[place] = code_O
            torch.sub(wanted_IO[place], rounded_O, out=lost_IO[place])
            target_BO[:column].addr_(shares_BB[column, :column], lost_IO[place])
            target_BO[column] -= rounded_O
        changed_O += target_BO.mul_(diagonal_I1[start:end]).square_().sum(dim=0)
    changed_O -= added_I[order_I] @ lost_IO.square_()
    codes_OI = codes_IO[order_I.argsort()].T.contiguous()
    return QuantizedWeight(codes_OI, parameters.scales_OG, args, parameters.zeros_OG), changed_O


def _better_rows(
    weight_OI: Tensor,
    hessian_II: Tensor,
    parameters: QuantizationParameters,
    quantized: QuantizedWeight,
    changed_O: Tensor,
) -> QuantizedWeight:
    """Each row as GPTQ solved it, or rounded to nearest where that has the smaller error."""
    nearest = parameters.round(weight_OI)
    worse_O = changed_O > output_error(weight_OI, nearest, hessian_II)
    codes_OI = torch.where(worse_O[:, None], nearest.codes_OI, quantized.codes_OI)
    return QuantizedWeight(codes_OI, quantized.scales_OG, quantized.args, quantized.zeros_OG)


def output_error(weight_OI: Tensor, quantized: QuantizedWeight, hessian_II: Tensor) -> Tensor:
    """The mean squared change of each output on inputs with this Hessian: (O,)."""
    error_OI = quantized.dequantize() - weight_OI.float()
    return ((error_OI @ hessian_II) * error_OI).sum(dim=1)
