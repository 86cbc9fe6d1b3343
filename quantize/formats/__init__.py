"""Checkpoint formats by name; one file per format: the tensors of a quantized layer, the config,
and reading both back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from packhorse.quantize.errors import Unsupported
from packhorse.quantize.numerics.grid import QuantizedWeight, Scheme

FORMATS = ("compressed-tensors", "gptq", "awq")


class Format(Protocol):
    """How the quantized layers of one checkpoint are stored."""

    @property
    def name(self) -> str:
        """`quant_method` in config.json."""
        ...

    @property
    def scheme(self) -> Scheme:
        """The scheme of most layers."""
        ...

    def scheme_of(self, prefix: str) -> Scheme: ...

    def tensors(self, prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of one linear layer, by full name. Raises ValueError when the layer's codes
        do not fill whole 32-bit words.
        """
        ...

    def config(self, *, ignore: Sequence[str], kv_scales: bool) -> dict[str, Any]:
        """`quantization_config` in config.json. `ignore` names the linear layers that are not
        quantized; `kv_scales` says that the checkpoint has k_scale and v_scale tensors. Raises
        Unsupported for what the format cannot express.
        """
        ...

    def linears(self, names: Sequence[str]) -> list[str]:
        """The prefixes of the quantized linear layers among tensor names."""
        ...

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> QuantizedWeight:
        """Read a quantized weight back from its tensors."""
        ...


def make(name: str, scheme: Scheme, others: Mapping[str, Scheme] | None = None) -> Format:
    """The format for writing a checkpoint. `others` are the layers of another scheme, which only
    compressed-tensors can store. Raises Unsupported for an unknown name, or a scheme that the
    format cannot store.
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
    """The format of a checkpoint with this `quantization_config`, which may be another tool's.
    Raises Unsupported.
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
