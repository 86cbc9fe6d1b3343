"""The GPTQ layout: codes packed along the inputs, a scale and a zero point a group.

qweight int32 (I*bits/32, O) | scales (G, O) | qzeros int32 (G, O*bits/32) | g_idx int32 (I), the
group of each input; vLLM ignores it, older readers want it.

Version 1 stores zero points minus one, version 2 as they are. Written is version 1, which every
reader knows, and symmetric only, as vLLM asks: the zero point is the middle of the codes throughout
(qzeros 0x77777777 at 4 bits). Read are both versions, asymmetric ones too.

Source: vLLM 0.32, model_executor/layers/quantization/auto_gptq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from packhorse.quantize.errors import Unsupported
from packhorse.quantize.numerics.grid import Codes, Grid, Scheme, pack, unpack
from torch import Tensor

# checkpoint_format -> what is subtracted from a zero point when it is stored.
SUBTRACTED = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class Gptq:
    scheme: Scheme
    version: str = "gptq"
    """A key of SUBTRACTED; read only, writing is version 1."""
    name: str = field(default="gptq", init=False)

    def scheme_of(self, prefix: str) -> Scheme:
        return self.scheme

    def tensors(self, prefix: str, codes: Codes) -> dict[str, Tensor]:
        bits, low = codes.grid.bits, codes.grid.low
        outputs, inputs = codes.codes_OI.shape
        groups = codes.scales_OG.shape[1]
        return {
            f"{prefix}.qweight": pack(codes.codes_OI.int() - low, bits).T,
            f"{prefix}.scales": codes.scales_OG.T,
            f"{prefix}.qzeros": pack(torch.full((groups, outputs), -low - 1), bits),
            f"{prefix}.g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
        }

    def config(self, *, ignore: Sequence[str], kv_scales: bool) -> dict[str, Any]:
        """`ignore` is not written: vLLM sees from the tensors which layers are packed."""
        if kv_scales:
            raise Unsupported("gptq has no place for KV scales; use --format compressed-tensors.")
        return {
            "quant_method": self.name,
            "checkpoint_format": "gptq",
            "bits": self.scheme.grid.bits,
            "group_size": self.scheme.grid.group_size or -1,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
        }

    def linears(self, names: Sequence[str]) -> list[str]:
        return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> Codes:
        """The zero points of symmetric codes are not looked at, as in vLLM: tools have mixed up the
        versions.
        """
        grid = self.scheme.grid
        codes_OI = unpack(get(f"{prefix}.qweight").T.contiguous(), grid.bits).int() + grid.low
        zeros_OG = None
        if not grid.symmetric:
            stored_GO = unpack(get(f"{prefix}.qzeros"), grid.bits).int()
            # A zero point of 0 minus one is stored as the largest code.
            zeros_GO = (stored_GO + SUBTRACTED[self.version]) % (1 << grid.bits)
            zeros_OG = zeros_GO.T.to(grid.code_dtype)
        return Codes(codes_OI.to(grid.code_dtype), get(f"{prefix}.scales").T, grid, zeros_OG)


def make(scheme: Scheme) -> Gptq:
    grid = scheme.grid
    if (
        grid.floating
        or not grid.symmetric
        or grid.bits not in (4, 8)
        or scheme.activation_bits != 16
    ):
        raise Unsupported(
            f"gptq cannot hold {scheme}{'' if grid.symmetric else ', asymmetric'}: it is for 4 or "
            "8 bits, symmetric, activations left alone; use --format compressed-tensors."
        )
    return Gptq(scheme)


def of(config: dict[str, Any]) -> Gptq:
    bits, group_size = config.get("bits"), config.get("group_size", -1)
    version = config.get("checkpoint_format") or "gptq"
    if bits not in (4, 8):
        raise Unsupported(f"gptq with bits={bits} cannot be read; 4 and 8 can.")
    if version not in SUBTRACTED:
        raise Unsupported(
            f"gptq with checkpoint_format {version!r} cannot be read; "
            f"{' and '.join(SUBTRACTED)} can."
        )
    if config.get("desc_act") and group_size != -1:
        raise Unsupported(
            "gptq with desc_act=true cannot be read, by vLLM neither; quantize again with "
            "desc_act=false."
        )
    grid = Grid(bits, None if group_size == -1 else group_size, config.get("sym", True))
    return Gptq(Scheme(grid), version)
