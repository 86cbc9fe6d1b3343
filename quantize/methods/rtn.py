"""Round to nearest: the baseline that GPTQ and AWQ have to beat, and all that FP8 needs.

Needs no calibration. (But see the README: on CPUs with AMX vLLM runs 4-bit checkpoints with 8-bit
activations unless told otherwise.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from packhorse.quantize.calibration.statistics import Inputs
from packhorse.quantize.methods import Rounded
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import Scheme, round_to_nearest
from torch import Tensor, nn


@dataclass(frozen=True)
class RoundToNearest:
    scheme: Scheme
    calibrated: bool = False

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
        return Rounded(round_to_nearest(weight_OI, self.scheme.grid, scale_dtype=scale_dtype))
