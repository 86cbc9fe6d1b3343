"""What a group of linear layers is given on the calibration rows, as running statistics.

Knows torch only. Filled by `blocks`, read by the methods.
"""

# Shapes: T = tokens, I = inputs of the layers, O = outputs.

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE_TOKENS = 2048


class Inputs:
    """Means over all tokens seen so far, float32.

    `x` are the inputs as the quantized model produces them, `y` as the original does. hessian_II
    is the mean of x x^T; drift_II that of (y - x) x^T; residual_OI that of (r_y - r_x) x^T, with r
    what the layer's output is added to. The last two are None where they were not asked for.
    """

    def __init__(self, *, magnitudes: bool = True) -> None:
        """`magnitudes`: also collect absmean_I, absmax_I and the sample."""
        self._magnitudes = magnitudes
        self.tokens = 0
        self.hessian_II = torch.zeros(())
        self.drift_II: Tensor | None = None
        self.residual_OI: Tensor | None = None
        self.absmean_I = torch.zeros(())
        self.absmax_I = torch.zeros(())
        self._samples: list[Tensor] = []

    @property
    def sample_TI(self) -> Tensor:
        """Up to about SAMPLE_TOKENS of the inputs, spread evenly over the rows."""
        x_TI = torch.cat(self._samples)
        return x_TI[:: max(1, len(x_TI) // SAMPLE_TOKENS)]

    def add(
        self, x_TI: Tensor, y_TI: Tensor | None = None, residual_TO: Tensor | None = None
    ) -> None:
        """Take more tokens. `residual_TO` is r_y - r_x."""
        x_TI = x_TI.reshape(-1, x_TI.shape[-1]).float()
        total = self.tokens + len(x_TI)
        old, new = self.tokens / total, 1 / total
        self.hessian_II = _running_mean(self.hessian_II, x_TI, x_TI, old, new)
        if self._magnitudes:
            magnitudes_TI = x_TI.abs()
            self.absmean_I = self.absmean_I * old + magnitudes_TI.sum(dim=0) * new
            self.absmax_I = torch.maximum(self.absmax_I, magnitudes_TI.amax(dim=0))
            self._samples.append(x_TI[::16].clone())
        if y_TI is not None:
            drift_TI = y_TI.reshape(x_TI.shape).float() - x_TI
            self.drift_II = _running_mean(self.drift_II, drift_TI, x_TI, old, new)
        if residual_TO is not None:
            residual_TO = residual_TO.reshape(len(x_TI), -1).float()
            self.residual_OI = _running_mean(self.residual_OI, residual_TO, x_TI, old, new)
        self.tokens = total


def _running_mean(
    mean: Tensor | None, left_TA: Tensor, right_TB: Tensor, old: float, new: float
) -> Tensor:
    """mean * old + left^T right * new, (A, B), in place where there is a mean already."""
    if mean is None or mean.ndim == 0:
        return (left_TA.T @ right_TB) * new
    updated: Tensor = mean.addmm_(left_TA.T, right_TB, beta=old, alpha=new)
    return updated
