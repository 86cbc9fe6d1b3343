"""GPTQ: round column by column, and let the columns still to come make up for each one's error.

Scales are fixed first, from the weight as it was ("static groups"), by a search that weighs each
input by its size in the calibration data. Then columns are rounded in the order of falling
importance ("act-order"), which static groups allow without a g_idx on disk.

Before all that, the weight is corrected for the errors of the layers before it (correction.py).

Source: GPTQ, arXiv:2210.17323. Its algorithm 1 spreads each error with a factor of the inverse
Hessian; the same codes come out of a factor of the Hessian itself when columns are taken from its
end (arXiv:2507.18553), which saves the inverse. Checked in the tests against a version that solves
the least-squares problem anew after every column.
"""

# Shapes: O = outputs, I = inputs, G = groups along I, B = columns of a block.

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from packhorse.quantize.calibration.statistics import Inputs
from packhorse.quantize.methods import Rounded
from packhorse.quantize.methods.error_compensation import correct
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.cholesky import factor_
from packhorse.quantize.numerics.grid import Codes, Placement, Scheme, search_placement
from torch import Tensor, nn

BLOCK = 128  # columns that make up in one product for all that are rounded before them
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
    diagonal_I = hessian_II.diagonal()
    order_I = diagonal_I.argsort(descending=True, stable=True).flip(0)
    mean = diagonal_I.mean().item()
    for damping in DAMPING:
        # An input that is always 0 takes no part, but must keep the matrix invertible, and not be
        # large beside the others: what it adds is taken off again at the end.
        added_I = torch.where(diagonal_I == 0, 1.0, damping) * (mean if mean > 0 else 1.0)
        damped_II = hessian_II[order_I[:, None], order_I]
        damped_II.diagonal().add_(added_I[order_I])
        lower_II = factor_(damped_II)
        if lower_II is not None:
            note = None if damping == DAMPING[0] else f"damped by {damping} of the mean diagonal"
            codes, changed_O = _round_columns(weight_OI, placement, order_I, lower_II, added_I)
            return Rounded(_better_rows(weight_OI, hessian_II, placement, codes, changed_O), note)
    return Rounded(placement.round(weight_OI), "rounded to nearest: Hessian not invertible")


def _round_columns(
    weight_OI: Tensor, placement: Placement, order_I: Tensor, lower_II: Tensor, added_I: Tensor
) -> tuple[Codes, Tensor]:
    """Rounded in order_I, from its end to its beginning, and how much that changes each output:
    (O,), mean square. lower_II is the Cholesky factor of the Hessian, in that order and with
    added_I on its diagonal. A column is rounded from where it makes up best for all that was
    rounded before it: those behind it in one product, those of its block one by one.
    """
    grid, inputs = placement.grid, weight_OI.shape[1]
    # Columns as rows: contiguous in memory.
    wanted_IO = weight_OI.float().T[order_I].contiguous()
    scales_GO = placement.scales_OG.float().T.contiguous()
    zeros_GO = None if placement.zeros_OG is None else placement.zeros_OG.float().T.contiguous()
    groups = (order_I // (inputs // len(scales_GO))).tolist()
    upper_II = lower_II.T
    diagonal_I1 = upper_II.diagonal().unsqueeze(1)
    lost_IO = torch.empty_like(wanted_IO)
    codes_IO = torch.empty(wanted_IO.shape, dtype=grid.code_dtype, device=wanted_IO.device)
    changed_O = torch.zeros_like(wanted_IO[0])
    for end in range(inputs, 0, -BLOCK):
        start = max(0, end - BLOCK)
        owed_BO = (upper_II[start:end, end:] @ lost_IO[end:]).div_(diagonal_I1[start:end])
        target_BO = owed_BO.add_(wanted_IO[start:end])
        # Row j: how much of what column j loses each column before it has to make up for.
        shares_BB = (upper_II[start:end, start:end] / diagonal_I1[start:end]).T.contiguous()
        for column in reversed(range(end - start)):
            place = start + column
            scale_O = scales_GO[groups[place]]
            steps_O = target_BO[column] / scale_O
            if zeros_GO is None:
                code_O = steps_O.round_().clamp_(grid.low, grid.high)
                rounded_O = code_O * scale_O
            else:
                zero_O = zeros_GO[groups[place]]
                code_O = steps_O.add_(zero_O).round_().clamp_(grid.low, grid.high)
                rounded_O = (code_O - zero_O) * scale_O
            codes_IO[place] = code_O
            torch.sub(wanted_IO[place], rounded_O, out=lost_IO[place])
            target_BO[:column].addr_(shares_BB[column, :column], lost_IO[place])
            target_BO[column] -= rounded_O
        changed_O += target_BO.mul_(diagonal_I1[start:end]).square_().sum(dim=0)
    changed_O -= added_I[order_I] @ lost_IO.square_()
    codes_OI = codes_IO[order_I.argsort()].T.contiguous()
    return Codes(codes_OI, placement.scales_OG, grid, placement.zeros_OG), changed_O


def _better_rows(
    weight_OI: Tensor, hessian_II: Tensor, placement: Placement, codes: Codes, changed_O: Tensor
) -> Codes:
    """Each output row as solved, or rounded to nearest where that happens to be better."""
    nearest = placement.round(weight_OI)
    worse_O = changed_O > output_error(weight_OI, nearest, hessian_II)
    codes_OI = torch.where(worse_O[:, None], nearest.codes_OI, codes.codes_OI)
    return Codes(codes_OI, codes.scales_OG, codes.grid, codes.zeros_OG)


def output_error(weight_OI: Tensor, codes: Codes, hessian_II: Tensor) -> Tensor:
    """The mean square change of each output on inputs with this Hessian: (O,)."""
    error_OI = codes.dequantize() - weight_OI.float()
    return ((error_OI @ hessian_II) * error_OI).sum(dim=1)
