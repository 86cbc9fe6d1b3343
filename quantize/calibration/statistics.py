"""What a group of linear layers is given on the calibration rows, as running statistics.

Knows torch only. Filled by `blocks`, read by the methods.
"""

# Shapes: T = tokens, I = inputs of the layers, O = outputs.

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_AT_ONCE = 2048
"""Of whole rows that go through a block together; at least one row does."""
SAMPLE_TOKENS = 2048
STRIPS = 4
"""In which a Hessian is computed: more save more of it, in products that are less efficient."""


class Inputs:
    """Means over all tokens seen so far, float32.

    `x` are the inputs as the quantized model produces them, `y` as the original does. hessian_II
    is the mean of x x^T. Where it was asked how the two differ: for one layer, missing_OI is the
    mean of m x^T, with m what its output on x, and what that is added to, lack of the original's;
    for several, drift_II is that of (y - x) x^T, from which each layer's m follows.
    """

    def __init__(self, *, magnitudes: bool = True) -> None:
        """`magnitudes`: also collect absmean_I, absmax_I and the sample."""
        self._magnitudes = magnitudes
        self.tokens = 0
        self._hessian_II: Tensor | None = None
        self._mirrored = True
        self.drift_II: Tensor | None = None
        self.missing_OI: Tensor | None = None
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
        """Into the Hessian: of what is below the diagonal only the nearest, as the rest mirrors
        what is above.
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
        """Up to about SAMPLE_TOKENS of the inputs, spread evenly over the rows."""
        x_TI = torch.cat(self._samples)
        return x_TI[:: max(1, len(x_TI) // SAMPLE_TOKENS)]

    def add(
        self, x_TI: Tensor, drift_TI: Tensor | None = None, missing_TO: Tensor | None = None
    ) -> None:
        """Take more tokens. `drift_TI` is y - x."""
        x_TI = x_TI.reshape(-1, x_TI.shape[-1]).float()
        total = self.tokens + len(x_TI)
        old, new = self.tokens / total, 1 / total
        self._add_square(x_TI, old, new)
        if self._magnitudes:
            magnitudes_TI = x_TI.abs()
            self.absmean_I = self.absmean_I * old + magnitudes_TI.sum(dim=0) * new
            self.absmax_I = torch.maximum(self.absmax_I, magnitudes_TI.amax(dim=0))
            self._samples.append(x_TI[::16].clone())
        if drift_TI is not None:
            drift_TI = drift_TI.reshape(x_TI.shape).float()
            self.drift_II = _running_mean(self.drift_II, drift_TI, x_TI, old, new)
        if missing_TO is not None:
            missing_TO = missing_TO.reshape(len(x_TI), -1).float()
            self.missing_OI = _running_mean(self.missing_OI, missing_TO, x_TI, old, new)
        self.tokens = total


def _strips(inputs: int) -> list[tuple[int, int]]:
    size = max(128, -(-inputs // STRIPS))
    return [(start, min(start + size, inputs)) for start in range(0, inputs, size)]


def _running_mean(
    mean: Tensor | None, left_TA: Tensor, right_TB: Tensor, old: float, new: float
) -> Tensor:
    """mean * old + left^T right * new, (A, B), in place where there is a mean already."""
    if mean is None:
        return (left_TA.T @ right_TB) * new
    updated: Tensor = mean.addmm_(left_TA.T, right_TB, beta=old, alpha=new)
    return updated
