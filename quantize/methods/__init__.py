"""Methods by name. One method is one file that reads top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from packhorse.quantize.calibration.statistics import Inputs
from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import Codes, Scheme
from torch import Tensor, nn


@dataclass(frozen=True)
class Rounded:
    """A weight's codes, and what the report should say about how they came to be, if anything."""

    codes: Codes
    note: str | None = None

    def noted(self, note: str | None) -> Rounded:
        """With one more note."""
        return Rounded(self.codes, "; ".join(filter(None, (note, self.note))) or None)


class Method(Protocol):
    """How the weights of linear layers become codes. Scales are made in `scale_dtype`, in which the
    engine reads them.
    """

    @property
    def scheme(self) -> Scheme: ...

    @property
    def calibrated(self) -> bool:
        """Whether it looks at what layers are given: `prepare` is called, `quantize` gets inputs
        (or None after all, where there is no calibration text and it can do without).
        """
        ...

    def prepare(
        self,
        block: nn.Module,
        family: Family,
        inputs: Callable[[], dict[str, Inputs]],
        quantized: Collection[str],
    ) -> list[str]:
        """Move scales between the layers of a block (float32, changed in place) where that makes
        the `quantized` ones easier to round; the block's function stays, and so do other linear
        layers. Returns the names of the layers whose
        inputs were looked at and left as they are. `inputs` runs the rows through the block: what
        each fused group is given, by its first layer's name.
        """
        ...

    def quantize(
        self, weight_OI: Tensor, inputs: Inputs | None, scale_dtype: torch.dtype
    ) -> Rounded:
        """The codes of one layer."""
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
