"""Running statistics of the inputs of a group of linear layers on the calibration rows.

Imports torch alone. Filled by runner.py, read by the methods.
"""

# Shapes: T = tokens, I = inputs of the layers, O = outputs.

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_AT_ONCE = 2048
"""Tokens per batch of rows that run through a block together; a batch has at least one row."""
SAMPLE_TOKENS = 2048
STRIPS = 4
"""Strips of rows in which a Hessian is computed. More strips skip more of the lower triangle, in
matrix products that are less efficient."""


class InputStatistics:
    """Means over all tokens so far, float32. x is a layer's input in the quantized model, y in the
    original.

    hessian_II: mean of x x^T.
    input_deviation_II: mean of (y - x) x^T. For groups of several layers, after the original's
        inputs were recorded; None otherwise.
    output_residual_OI: mean of (target - output) x^T, where target is the original model's residual
        stream after this layer, and output is the quantized model's with this layer not yet
        quantized. For groups of one layer; the residual stream is left out where the family does
        not name the norm that it enters. None otherwise.
    absmean_I, absmax_I: mean and maximum of |x|.
    """

    def __init__(self, *, magnitudes: bool = True) -> None:
        """With `magnitudes`, also collects absmean_I, absmax_I and sample_TI."""
        self._magnitudes = magnitudes
        self.tokens = 0
        self._hessian_II: Tensor | None = None
        self._mirrored = True
        self.input_deviation_II: Tensor | None = None
        self.output_residual_OI: Tensor | None = None
        self.absmean_I = torch.zeros(())
        self.absmax_I = torch.zeros(())
        self._samples: list[Tensor] = []

    @property
    def hessian_II(self) -> Tensor:
        assert self._hessian_II is not None
        if not self._mirrored:
            for start, end in _strips(len(self._hessian_II)):
                self._hessian_II[end:, start:end] = self._hessian_II[start:end, end:].T
            self._mirrored = True
        return self._hessian_II

    def _add_square(self, x_TI: Tensor, old: float, new: float) -> None:
        """Add x x^T to the Hessian, without the part of its lower triangle that lies outside the
        strips' diagonal squares; `hessian_II` mirrors it from the upper triangle.
        """
        inputs = x_TI.shape[1]
        if self._hessian_II is None:
            self._hessian_II = x_TI.new_zeros(inputs, inputs)
        for start, end in _strips(inputs):
            strip_SI = self._hessian_II[start:end, start:]
            strip_SI.addmm_(x_TI[:, start:end].T, x_TI[:, start:], beta=old, alpha=new)
        self._mirrored = False

    @property
    def sample_TI(self) -> Tensor:
        """About SAMPLE_TOKENS of the inputs x at most, spread evenly over the rows."""
        x_TI = torch.cat(self._samples)
        return x_TI[:: max(1, len(x_TI) // SAMPLE_TOKENS)]

    def add(
        self, x_TI: Tensor, deviation_TI: Tensor | None = None, residual_TO: Tensor | None = None
    ) -> None:
        """Add tokens. `deviation_TI` is y - x; `residual_TO` is target - output."""
        x_TI = x_TI.reshape(-1, x_TI.shape[-1]).float()
        total = self.tokens + len(x_TI)
        old, new = self.tokens / total, 1 / total
        self._add_square(x_TI, old, new)
        if self._magnitudes:
            magnitudes_TI = x_TI.abs()
            self.absmean_I = self.absmean_I * old + magnitudes_TI.sum(dim=0) * new
            self.absmax_I = torch.maximum(self.absmax_I, magnitudes_TI.amax(dim=0))
            self._samples.append(x_TI[::16].clone())
        if deviation_TI is not None:
            deviation_TI = deviation_TI.reshape(x_TI.shape).float()
            self.input_deviation_II = _running_mean(
                self.input_deviation_II, deviation_TI, x_TI, old, new
            )
        if residual_TO is not None:
            residual_TO = residual_TO.reshape(len(x_TI), -1).float()
            self.output_residual_OI = _running_mean(
                self.output_residual_OI, residual_TO, x_TI, old, new
            )
        self.tokens = total


def _strips(inputs: int) -> list[tuple[int, int]]:
    size = max(128, -(-inputs // STRIPS))
    return [(start, min(start + size, inputs)) for start in range(0, inputs, size)]


def _running_mean(
    mean: Tensor | None, left_TA: Tensor, right_TB: Tensor, old: float, new: float
) -> Tensor:
    """mean * old + left^T right * new: (A, B). In place when there is a mean already."""
    if mean is None:
        return (left_TA.T @ right_TB) * new
    updated: Tensor = mean.addmm_(left_TA.T, right_TB, beta=old, alpha=new)
    return updated
