"""The AWQ layout, version gemm: 4-bit codes packed along the outputs, with a scale and a zero point
a group.

qweight int32 (I, O/8) | scales (G, O) | qzeros int32 (G, O/8), zero points as they are. Within a
word the outputs lie in a shuffled order.

Always written with zero points: kernels for AWQ without them are few. A symmetric grid is one whose
zero points are all 8, so it reads back as asymmetric, with the same weights.

Source: vLLM 0.32, model_executor/layers/quantization/auto_awq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from packhorse.quantize.errors import Unsupported
from packhorse.quantize.numerics.grid import Codes, Grid, Scheme, pack, unpack
from torch import Tensor

BITS = 4
# The four bits at 4*i of a word belong to output ORDER[i] of its eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Last parts of the names of layers that are quantized as a rule, as stored and as vLLM fuses them.
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

    def tensors(self, prefix: str, codes: Codes) -> dict[str, Tensor]:
        # low is -8 for symmetric codes: they become 0 .. 15 around 8.
        low = codes.grid.low
        zeros_OG = codes.zeros_OG
        if zeros_OG is None:
            zeros_OG = torch.full_like(codes.scales_OG, -low, dtype=torch.int32)
        return {
            f"{prefix}.qweight": _pack_outputs((codes.codes_OI.int() - low).T),
            f"{prefix}.scales": codes.scales_OG.T,
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
            "group_size": self.scheme.grid.group_size or -1,
            "zero_point": True,
            "modules_to_not_convert": list(ignore),
        }

    def linears(self, names: Sequence[str]) -> list[str]:
        return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> Codes:
        grid = replace(self.scheme.grid, symmetric=False)
        return Codes(
            _unpack_outputs(get(f"{prefix}.qweight")).T,
            get(f"{prefix}.scales").T,
            grid,
            _unpack_outputs(get(f"{prefix}.qzeros")).T,
        )


def make(scheme: Scheme) -> Awq:
    if scheme.grid.floating or scheme.grid.bits != BITS or scheme.activation_bits != 16:
        raise Unsupported(
            f"awq cannot hold {scheme}: it is for 4 bits, activations left alone; "
            "use --format compressed-tensors."
        )
    return Awq(scheme)


def of(config: dict[str, Any]) -> Awq:
    # The second names are those of quant_config.json of old.
    bits = config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size", -1))
    version = str(config.get("version", "gemm")).lower()
    if bits != BITS:
        raise Unsupported(f"awq with bits={bits} cannot be read; {BITS} can.")
    if version != "gemm":
        raise Unsupported(f"awq version {version!r} cannot be read; gemm can.")
    return Awq(Scheme(Grid(BITS, None if group_size == -1 else group_size, symmetric=False)))


def _refuse_catching_others(ignored: str) -> None:
    """Readers of modules_to_not_convert leave out each layer whose name *contains* an entry: `gate`
    takes `gate_proj` with it.
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
    """Codes 0 .. 15 (X, O), X inputs or groups, as int32 (X, O/8)."""
    rows, outputs = codes_XO.shape
    if outputs % len(ORDER):
        raise ValueError(f"{outputs} outputs are not a multiple of {len(ORDER)}")
    shuffled = codes_XO.reshape(rows, -1, len(ORDER))[:, :, list(ORDER)]
    return pack(shuffled.reshape(rows, outputs), BITS)


def _unpack_outputs(words_XP: Tensor) -> Tensor:
    """The inverse: uint8 (X, O)."""
    rows = words_XP.shape[0]
    back = torch.tensor(ORDER).argsort()
    return unpack(words_XP, BITS).reshape(rows, -1, len(ORDER))[:, :, back].reshape(rows, -1)
