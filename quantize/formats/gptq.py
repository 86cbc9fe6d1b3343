"""The GPTQ layout, version 1: 4-bit codes packed along the inputs, one scale a group, zero point
stored minus one.

qweight int32 (I/8, O) | scales (G, O) | qzeros int32 (G, O/8) | g_idx int32 (I). Symmetric: the
zero point is 8 for all, stored as 7, so qzeros is 0x77777777 throughout. vLLM ignores g_idx; older
readers want it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantize.grid import Codes, Grid, pack_int4, unpack_int4

ZERO_POINT = 8


def tensors(prefix: str, codes: Codes) -> dict[str, Tensor]:
    outputs, inputs = codes.codes_OI.shape
    groups = codes.scales_OG.shape[1]
    return {
        f"{prefix}.qweight": pack_int4(codes.codes_OI + ZERO_POINT).T,
        f"{prefix}.scales": codes.scales_OG.T,
        f"{prefix}.qzeros": pack_int4(torch.full((groups, outputs), ZERO_POINT - 1)),
        f"{prefix}.g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
    }


def config(grid: Grid) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }


def read(prefix: str, get: Callable[[str], Tensor], config: dict[str, Any]) -> Codes:
    codes_OI = unpack_int4(get(f"{prefix}.qweight").T.contiguous()).to(torch.int8) - ZERO_POINT
    return Codes(codes_OI, get(f"{prefix}.scales").T, Grid(config["bits"], config["group_size"]))


def linears(names: list[str]) -> list[str]:
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
