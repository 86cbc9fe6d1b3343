"""On-disk layouts by name. One layout is one file: which tensors a weight becomes, what the config
says, how to read it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from packhorse.quantize.errors import Unsupported
from packhorse.quantize.numerics.grid import Codes, Scheme
from torch import Tensor

FORMATS = ("compressed-tensors", "gptq", "awq")


class Format(Protocol):
    """How the quantized layers of one checkpoint are laid out."""

    @property
    def name(self) -> str:
        """config.json's `quant_method`."""
        ...

    @property
    def scheme(self) -> Scheme:
        """Of most layers."""
        ...

    def scheme_of(self, prefix: str) -> Scheme: ...

    def tensors(self, prefix: str, codes: Codes) -> dict[str, Tensor]:
        """The tensors of one linear layer, by full name. Raises ValueError when the layer's sizes
        do not fill whole 32-bit words.
        """
        ...

    def config(self, *, ignore: Sequence[str], kv_scales: bool) -> dict[str, Any]:
        """config.json's `quantization_config`. `ignore` names the linear layers that stay as they
        are; `kv_scales` says that the checkpoint has k_scale and v_scale tensors. Raises
        Unsupported for what the layout cannot say.
        """
        ...

    def linears(self, names: Sequence[str]) -> list[str]:
        """The prefixes of the quantized linear layers among tensor names."""
        ...

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> Codes:
        """The codes back from the tensors."""
        ...


def make(name: str, scheme: Scheme, others: Mapping[str, Scheme] | None = None) -> Format:
    """The layout for checkpoints that are to be written; `others` are the layers of another scheme,
    which compressed-tensors alone can hold. Raises Unsupported for an unknown name, or a scheme
    that the layout cannot hold.
    """
    from packhorse.quantize.formats import awq, compressed_tensors, gptq, mixed

    if others and name != FORMATS[0]:
        raise Unsupported(f"{name} cannot hold layers of several schemes; use {FORMATS[0]}.")
    match name:
        case "compressed-tensors" if others:
            return mixed.make_mixed(scheme, others)
        case "compressed-tensors":
            return compressed_tensors.make(scheme)
        case "gptq":
            return gptq.make(scheme)
        case "awq":
            return awq.make(scheme)
    raise Unsupported(f"format {name!r} is not known; known are {', '.join(FORMATS)}.")


def of(config: dict[str, Any]) -> Format:
    """The layout of a checkpoint with this `quantization_config`, ours or another tool's. Raises
    Unsupported.
    """
    from packhorse.quantize.formats import awq, compressed_tensors, gptq, mixed

    match config.get("quant_method"):
        case "compressed-tensors":
            groups = compressed_tensors.of(config)
            alike = len({kind for _, kind in groups}) == 1
            return groups[0][1] if alike else mixed.Mixed(tuple(groups))
        case "gptq":
            return gptq.of(config)
        case "awq":
            return awq.of(config)
    raise Unsupported(
        f"quant_method {config.get('quant_method')!r} is not known; known are {', '.join(FORMATS)}."
    )
