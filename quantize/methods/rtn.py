"""Round to nearest, 4-bit weights in groups: the baseline that GPTQ and AWQ have to beat.

Needs no calibration. Activations stay as they are (but see the README: on CPUs with AMX vLLM runs
4-bit checkpoints with 8-bit activations unless told otherwise).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.grid import Codes, Grid, round_to_nearest
from quantize.methods import Method


def method(group_size: int) -> Method:
    grid = Grid(bits=4, group_size=group_size)

    def quantize(weight_OI: Tensor) -> Codes:
        return round_to_nearest(weight_OI, grid, scale_dtype=torch.bfloat16)

    return Method(
        "rtn", f"4-bit weights in groups of {group_size}, round to nearest", grid, "gptq", quantize
    )
