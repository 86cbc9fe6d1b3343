"""Pure maths of integer grids: scales, rounding, dequantizing, packing. Tensors in, tensors out;
knows torch only.

Shapes: O = outputs, I = inputs, G = groups along I (one group: G = 1), P = packed int32 words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A symmetric signed integer grid. group_size None means one scale for a whole output row."""

    bits: int
    group_size: int | None = None

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Codes:
    """A quantized weight: codes_OI int8 within the grid, scales_OG; weight = code * scale of its
    group.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    grid: Grid

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 (O, I)."""
        per_group = self.codes_OI.shape[1] // self.scales_OG.shape[1]
        return self.codes_OI.float() * self.scales_OG.float().repeat_interleave(per_group, dim=1)


def absmax_scales(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Scales float32 (O, G) that spread the grid's 2^bits steps over twice each group's largest
    magnitude.

    An all-zero group gets scale 1. Raises ValueError when group_size does not divide I.
    """
    outputs, inputs = weight_OI.shape
    group_size = grid.group_size or inputs
    if inputs % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {inputs} inputs")
    absmax_OG = (
        weight_OI.float().reshape(outputs, inputs // group_size, group_size).abs().amax(dim=2)
    )
    scales_OG = absmax_OG * 2 / (2**grid.bits - 1)
    return torch.where(scales_OG == 0, 1.0, scales_OG)


def round_to_nearest(weight_OI: Tensor, grid: Grid, *, scale_dtype: torch.dtype) -> Codes:
    """Round each weight to the nearest step. Scales are rounded to `scale_dtype` first: the codes
    fit what is stored.
    """
    scales_OG = absmax_scales(weight_OI, grid).to(scale_dtype)
    scales_OG = torch.where(scales_OG == 0, 1.0, scales_OG)  # too small for scale_dtype
    per_group = weight_OI.shape[1] // scales_OG.shape[1]
    steps_OI = weight_OI.float() / scales_OG.float().repeat_interleave(per_group, dim=1)
    return Codes(steps_OI.round().clamp(grid.low, grid.high).to(torch.int8), scales_OG, grid)


def pack_int4(codes_OI: Tensor) -> Tensor:
    """Unsigned 4-bit codes (O, I), values 0..15, as int32 (O, I/8): eight along I, the first in the
    lowest bits.
    """
    outputs, inputs = codes_OI.shape
    nibbles = codes_OI.to(torch.int64).reshape(outputs, inputs // 8, 8)
    words_OP = (nibbles << (4 * torch.arange(8))).sum(dim=2)
    # int64 0..2^32-1 to the int32 of the same bits.
    return torch.where(words_OP >= 2**31, words_OP - 2**32, words_OP).to(torch.int32)


def unpack_int4(words_OP: Tensor) -> Tensor:
    """The inverse of pack_int4: uint8 (O, 8 P), values 0..15."""
    nibbles = (words_OP.to(torch.int64).unsqueeze(2) >> (4 * torch.arange(8))) & 15
    return nibbles.reshape(words_OP.shape[0], -1).to(torch.uint8)


def round_activations(x_TI: Tensor) -> Tensor:
    """What a W8A8 kernel makes of its input: 8-bit symmetric, one scale a token, in x's dtype."""
    scales_T1 = x_TI.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-10) / 127
    return ((x_TI.float() / scales_T1).round().clamp(-128, 127) * scales_T1).to(x_TI.dtype)


def relative_error(weight_OI: Tensor, codes: Codes) -> float:
    """Squared error of the dequantized weight over the weight's own square sum; 0 is perfect."""
    weight_OI = weight_OI.float()
    return (
        (codes.dequantize() - weight_OI).square().sum() / weight_OI.square().sum().clamp_min(1e-30)
    ).item()
