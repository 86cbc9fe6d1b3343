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
        # vLLM keeps scales in the model's dtype.
        half = weight_OI.dtype in (torch.float16, torch.bfloat16)
        scale_dtype = weight_OI.dtype if half else torch.bfloat16
        return round_to_nearest(weight_OI, grid, scale_dtype=scale_dtype)

    return Method(
        "rtn", f"4-bit weights in groups of {group_size}, round to nearest", grid, "gptq", quantize
    )
