"""Round to nearest: the baseline for GPTQ and AWQ, and the method of FP8. Needs no calibration
text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packhorse.quantize.calibration.statistics import InputStatistics
from packhorse.quantize.methods import QuantizationResult
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import Scheme, round_to_nearest


@dataclass(frozen=True)
class RoundToNearest:
    scheme: Scheme
    calibrated: bool = False

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
        return QuantizationResult(
            round_to_nearest(weight_OI, self.scheme.weights, scale_dtype=scale_dtype)
        )
