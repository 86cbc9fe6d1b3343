"""Quantization methods by name; one file per method. docs/add-a-method.md adds one step by step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from packhorse.quantize.calibration.statistics import InputStatistics
from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import QuantizedWeight, Scheme


@dataclass(frozen=True)
class QuantizationResult:
    """A quantized weight and, where something went differently than planned, a note for the
    report.
    """

    weight: QuantizedWeight
    note: str | None = None

    def with_note(self, note: str | None) -> QuantizationResult:
        """The same weight with one more note, placed before the present one."""
        return QuantizationResult(self.weight, "; ".join(filter(None, (note, self.note))) or None)


class Method(Protocol):
    """How the weights of linear layers are quantized."""

    @property
    def scheme(self) -> Scheme: ...

    @property
    def calibrated(self) -> bool:
        """Whether the method reads input statistics. If so, `prepare` is called and `quantize` gets
        statistics, or None when there is no calibration text and the method can do without.
        """
        ...

    def prepare(
        self,
        block: nn.Module,
        family: Family,
        statistics: Callable[[], dict[str, InputStatistics]],
        quantized: Collection[str],
    ) -> list[str]:
        """Move scales between the layers of a block where the `quantized` layers then lose less.

        `block` is in float32 and changed in place. The function that it computes stays the same,
        and so do the weights of linear layers that are not quantized. `statistics` runs the
        calibration rows through the block and returns the input statistics of each fused group, by
        the group's first layer. Returns the names of the layers that were searched and left alone.
        """
        ...

    def quantize(
        self, weight_OI: Tensor, statistics: InputStatistics | None, scale_dtype: torch.dtype
    ) -> QuantizationResult:
        """Quantize one layer's weight. Scales are made in `scale_dtype`, in which the engine reads
        them.
        """
        ...


def _int8(scheme: Scheme) -> Method:
    from packhorse.quantize.methods.int8 import Int8

    return Int8(scheme)


def _rtn(scheme: Scheme) -> Method:
    from packhorse.quantize.methods.rtn import RoundToNearest

    return RoundToNearest(scheme)


def _gptq(scheme: Scheme) -> Method:
    from packhorse.quantize.methods.gptq import Gptq

    return Gptq(scheme)


def _awq(scheme: Scheme) -> Method:
    from packhorse.quantize.methods.awq import Awq

    return Awq(scheme)


METHODS: dict[str, Callable[[Scheme], Method]] = {
    "awq": _awq,
    "fp8": _rtn,
    "gptq": _gptq,
    "int8": _int8,
    "rtn": _rtn,
}


def make(name: str, scheme: Scheme) -> Method:
    """Raises BadInput with the known methods."""
    if name not in METHODS:
        raise BadInput(f"--method {name} is not known; choose one of {', '.join(sorted(METHODS))}.")
    return METHODS[name](scheme)
