"""Round to nearest: the baseline that GPTQ and AWQ have to beat, and all that FP8 needs.

Needs no calibration. (But see the README: on CPUs with AMX vLLM runs 4-bit checkpoints with 8-bit
activations unless told otherwise.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.families import Family
from quantize.grid import Scheme, round_to_nearest
from quantize.inputs import Inputs
from quantize.methods import Rounded


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
