"""On-disk layouts by name. One layout is one file: which tensors a weight becomes, what the config
says, how to read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from quantize.errors import Unsupported
from quantize.grid import Codes, Grid


class Format(Protocol):
    """What each module of this package offers."""

    def tensors(self, prefix: str, codes: Codes) -> dict[str, Tensor]:
        """The tensors of one linear layer, by full name."""
        ...

    def config(self, grid: Grid) -> dict[str, Any]:
        """config.json's `quantization_config`."""
        ...

    def read(self, prefix: str, get: Callable[[str], Tensor], config: dict[str, Any]) -> Codes:
        """The codes back from the tensors."""
        ...

    def linears(self, names: list[str]) -> list[str]:
        """The prefixes of the quantized linear layers among tensor names."""
        ...


def by_name(name: str) -> Format:
    """The layout called `name` in config.json's `quant_method`. Raises Unsupported for an unknown
    one.
    """
    if name == "compressed-tensors":
        from quantize.formats import compressed_tensors

        return compressed_tensors
    if name == "gptq":
        from quantize.formats import gptq

        return gptq
    raise Unsupported(f"quant_method {name!r} is not known; known are compressed-tensors and gptq.")
