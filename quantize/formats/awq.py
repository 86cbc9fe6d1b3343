"""The AWQ format, version gemm: 4-bit codes packed along the outputs, with a scale and a zero point
per group.

qweight int32 (I, O/8) | scales (G, O) | qzeros int32 (G, O/8). Zero points are stored unchanged.
Within a word, the outputs are in a shuffled order.

Zero points are always written, as few kernels for AWQ work without. A symmetric weight gets zero
points of 8, and so it reads back as asymmetric, with the same values.

Source: vLLM 0.32, model_executor/layers/quantization/auto_awq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from packhorse.quantize.errors import Unsupported
from packhorse.quantize.numerics.grid import QuantizationArgs, QuantizedWeight, Scheme, pack, unpack

BITS = 4
# The four bits at 4*i of a word belong to output ORDER[i] of its eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Last parts of the names of layers that are usually quantized, as stored and as vLLM fuses them.
_LINEARS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)


@dataclass(frozen=True)
class Awq:
    scheme: Scheme
    name: str = field(default="awq", init=False)

    def scheme_of(self, prefix: str) -> Scheme:
        return self.scheme

    def tensors(self, prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        # low is -8 for symmetric codes, which become 0 .. 15 with a zero point of 8.
        low = weight.args.low
        zeros_OG = weight.zeros_OG
        if zeros_OG is None:
            zeros_OG = torch.full_like(weight.scales_OG, -low, dtype=torch.int32)
        return {
            f"{prefix}.qweight": _pack_outputs((weight.codes_OI.int() - low).T),
            f"{prefix}.scales": weight.scales_OG.T,
            f"{prefix}.qzeros": _pack_outputs(zeros_OG.T),
        }

    def config(self, *, ignore: Sequence[str], kv_scales: bool) -> dict[str, Any]:
        if kv_scales:
            raise Unsupported("awq has no place for KV scales; use --format compressed-tensors.")
        for name in ignore:
            _refuse_catching_others(name)
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": BITS,
            "group_size": self.scheme.weights.group_size or -1,
            "zero_point": True,
            "modules_to_not_convert": list(ignore),
        }

    def linears(self, names: Sequence[str]) -> list[str]:
        return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> QuantizedWeight:
        args = replace(self.scheme.weights, symmetric=False)
        return QuantizedWeight(
            _unpack_outputs(get(f"{prefix}.qweight")).T,
            get(f"{prefix}.scales").T,
            args,
            _unpack_outputs(get(f"{prefix}.qzeros")).T,
        )


def make(scheme: Scheme) -> Awq:
    if scheme.weights.floating or scheme.weights.bits != BITS or scheme.activation_bits != 16:
        raise Unsupported(
            f"awq cannot hold {scheme}: it is for 4 bits, activations left alone; "
            "use --format compressed-tensors."
        )
    return Awq(scheme)


def of(config: dict[str, Any]) -> Awq:
    # The second names are those of quant_config.json, which early AWQ checkpoints have.
    bits = config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size", -1))
    version = str(config.get("version", "gemm")).lower()
    if bits != BITS:
        raise Unsupported(f"awq with bits={bits} cannot be read; {BITS} can.")
    if version != "gemm":
        raise Unsupported(f"awq version {version!r} cannot be read; gemm can.")
    return Awq(
        Scheme(QuantizationArgs(BITS, None if group_size == -1 else group_size, symmetric=False))
    )


def _refuse_catching_others(ignored: str) -> None:
    """Raises Unsupported for an ignored layer whose name would match others, too. Readers match a
    layer when its name *contains* an entry of modules_to_not_convert: `gate` matches `gate_proj`.
    """
    parent, _, last = ignored.rpartition(".")
    caught = [
        name
        for name in _LINEARS
        if name != last and (name.startswith(last) if parent else last in name)
    ]
    if caught:
        raise Unsupported(
            f"awq cannot leave out {ignored} alone: {caught[0]} beside it would stay unquantized "
            "too; use --format compressed-tensors."
        )


def _pack_outputs(codes_XO: Tensor) -> Tensor:
    """Pack codes 0 .. 15 (X, O) into int32 (X, O/8), where X are inputs or groups."""
    rows, outputs = codes_XO.shape
    if outputs % len(ORDER):
        raise ValueError(f"{outputs} outputs are not a multiple of {len(ORDER)}")
    shuffled = codes_XO.reshape(rows, -1, len(ORDER))[:, :, list(ORDER)]
    return pack(shuffled.reshape(rows, outputs), BITS)


def _unpack_outputs(words_XP: Tensor) -> Tensor:
    """The inverse of `_pack_outputs`: uint8 (X, O)."""
    rows = words_XP.shape[0]
    back = torch.tensor(ORDER).argsort()
    return unpack(words_XP, BITS).reshape(rows, -1, len(ORDER))[:, :, back].reshape(rows, -1)
