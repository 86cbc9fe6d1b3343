"""GPTQ: round column by column, and let the columns still to come make up for each one's error.

Scales are fixed first, from the weight as it was ("static groups"), by a search that weighs each
input by its size in the calibration data. Then columns are rounded in the order of falling
importance ("act-order"), which static groups allow without a g_idx on disk.

Before all that, the weight is corrected for the errors of the layers before it (correction.py).

Source: GPTQ, arXiv:2210.17323, algorithm 1. Checked in the tests against a version that solves the
least-squares problem anew after every column.
"""

# Shapes: O = outputs, I = inputs, G = groups along I, B = columns of a block.

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.families import Family
from quantize.grid import Codes, Placement, Scheme, search_placement
from quantize.inputs import Inputs
from quantize.methods import Rounded
from quantize.methods.correction import correct

BLOCK = 128  # columns whose errors are gathered before they are spread over the rest
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean diagonal, until the factorization succeeds


@dataclass(frozen=True)
class Gptq:
    scheme: Scheme
    calibrated: bool = True

    def prepare(
        self,
        block: nn.Module,
        family: Family,
        inputs: Callable[[], dict[str, Inputs]],
        quantized: Collection[str],
    ) -> list[str]:
        return []

    def quantize(
        self, weight_OI: Tensor, inputs: Inputs | None, scale_dtype: torch.dtype
    ) -> Rounded:
        assert inputs is not None
        corrected_OI, note = correct(weight_OI, inputs)
        placement = search_placement(
            corrected_OI, self.scheme.grid, inputs.hessian_II.diagonal(), scale_dtype=scale_dtype
        )
        return solve(corrected_OI, inputs.hessian_II, placement).noted(note)


def solve(weight_OI: Tensor, hessian_II: Tensor, placement: Placement) -> Rounded:
    """Codes on the placement that change the layer's output least on inputs with this Hessian (the
    mean of x x^T, float32); never worse than rounding to nearest, row by row. Neither argument is
    changed. Where no damping makes the Hessian invertible, rounds to nearest and says so.
    """
    for damping in DAMPING:
        order_I, factor_II = _factor(hessian_II, damping)
        if factor_II is not None:
            note = None if damping == DAMPING[0] else f"damped by {damping} of the mean diagonal"
            codes = _round_columns(weight_OI, placement, order_I, factor_II)
            return Rounded(_better_rows(weight_OI, hessian_II, codes, placement), note)
    return Rounded(placement.round(weight_OI), "rounded to nearest: Hessian not invertible")


def _factor(hessian_II: Tensor, damping: float) -> tuple[Tensor, Tensor | None]:
    """The order of columns, and the upper Cholesky factor of the damped inverse in that order; None
    when it cannot be had.
    """
    diagonal_I = hessian_II.diagonal()
    order_I = diagonal_I.argsort(descending=True, stable=True)
    # An input that is always 0 takes no part; 1 keeps the matrix invertible.
    added_I = torch.where(diagonal_I == 0, 1.0, damping * diagonal_I.mean())
    # Of several matrices of this size, two are held at a time.
    damped_II = hessian_II[order_I[:, None], order_I]
    damped_II.diagonal().add_(added_I[order_I])
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    del damped_II
    if failed or not lower_II.isfinite().all():
        return order_I, None
    inverse_II = torch.cholesky_inverse(lower_II)
    del lower_II
    upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
    if failed or not upper_II.isfinite().all():
        return order_I, None
    return order_I, upper_II


def _round_columns(
    weight_OI: Tensor, placement: Placement, order_I: Tensor, factor_II: Tensor
) -> Codes:
    """Rounded in order_I. After a column, the error it leaves is spread over the columns behind it,
    at once inside a block and in one product over the rest.
    """
    grid, inputs = placement.grid, weight_OI.shape[1]
    # Columns as rows: contiguous in memory.
    left_IO = weight_OI.float().T[order_I].contiguous()
    group_I = order_I // (inputs // placement.scales_OG.shape[1])
    scales_GO = placement.scales_OG.float().T.contiguous()
    zeros_GO = None if placement.zeros_OG is None else placement.zeros_OG.float().T.contiguous()
    codes_IO = torch.empty_like(left_IO)
    groups = group_I.tolist()
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        block_BO = left_IO[start:end]
        errors_BO = torch.empty_like(block_BO)
        factor_BB = factor_II[start:end, start:end]
        diagonal = factor_BB.diagonal().tolist()
        for column in range(end - start):
            group = groups[start + column]
            scale_O = scales_GO[group]
            steps_O = block_BO[column] / scale_O
            if zeros_GO is None:
                code_O = steps_O.round_().clamp_(grid.low, grid.high)
                rounded_O = code_O * scale_O
            else:
                code_O = steps_O.add_(zeros_GO[group]).round_().clamp_(grid.low, grid.high)
                rounded_O = (code_O - zeros_GO[group]) * scale_O
            codes_IO[start + column] = code_O
            errors_BO[column] = (block_BO[column] - rounded_O) / diagonal[column]
            block_BO[column + 1 :].addr_(
                factor_BB[column, column + 1 :], errors_BO[column], alpha=-1
            )
        left_IO[end:] -= factor_II[start:end, end:].T @ errors_BO
    codes_OI = codes_IO[order_I.argsort()].T.contiguous().to(grid.code_dtype)
    return Codes(codes_OI, placement.scales_OG, grid, placement.zeros_OG)


def _better_rows(
    weight_OI: Tensor, hessian_II: Tensor, codes: Codes, placement: Placement
) -> Codes:
    """Each output row as solved, or rounded to nearest where that happens to be better."""
    nearest = placement.round(weight_OI)
    worse_O = output_error(weight_OI, codes, hessian_II) > output_error(
        weight_OI, nearest, hessian_II
    )
    codes_OI = torch.where(worse_O[:, None], nearest.codes_OI, codes.codes_OI)
    return Codes(codes_OI, codes.scales_OG, codes.grid, codes.zeros_OG)


def output_error(weight_OI: Tensor, codes: Codes, hessian_II: Tensor) -> Tensor:
    """The mean square change of each output on inputs with this Hessian: (O,)."""
    error_OI = codes.dequantize() - weight_OI.float()
    return ((error_OI @ hessian_II) * error_OI).sum(dim=1)
