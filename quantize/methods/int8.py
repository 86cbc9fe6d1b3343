"""INT8 (W8A8): 8-bit weights with one scale per output, inputs rounded to 8 bits per token while
serving.

The 8-bit layout that vLLM runs on CPU and CUDA alike. Needs no calibration; halves a bf16
checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.grid import Codes, Grid, round_to_nearest
from quantize.methods import Method

GRID = Grid(bits=8)


def quantize(weight_OI: Tensor) -> Codes:
    """Round to nearest. Scales stay float32, as vLLM's kernel reads them."""
    return round_to_nearest(weight_OI, GRID, scale_dtype=torch.float32)


def method() -> Method:
    return Method(
        "int8",
        "8-bit weights and activations, round to nearest",
        GRID,
        "compressed-tensors",
        quantize,
        8,
    )
