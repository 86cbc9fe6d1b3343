"""Pure maths of quantization grids: scales, rounding, dequantizing, packing. Tensors in, tensors
out; knows torch only.

Shapes: O = outputs, I = inputs, G = groups along I (one group: G = 1), P = packed int32 words,
T = tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
WEIGHTS_CACHED = 1 << 18
"""Weights of rows that a CPU searches scales for together: a megabyte stays in its caches while 48
are tried, which is six times as fast as all rows at once."""


@dataclass(frozen=True)
class Grid:
    """What values a weight may take: 2^bits integers times a scale, or 8-bit floats times a scale.

    Symmetric integers are signed; asymmetric ones are 0 .. 2^bits - 1 around a zero point.
    group_size None means one scale for a whole output row.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    floating: bool = False

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """What holds a code; a zero point too."""
        if self.floating:
            return FP8
        return torch.int8 if self.symmetric else torch.uint8


@dataclass(frozen=True)
class Scheme:
    """How linear layers are held and run: the grid of their weights, and the bits their inputs are
    rounded to while serving (16: not at all; 8: one scale a token).
    """

    grid: Grid
    activation_bits: int = 16

    def __str__(self) -> str:
        if self.grid.floating:
            return "FP8 (W8A8)"
        return f"W{self.grid.bits}A{self.activation_bits}"


@dataclass(frozen=True)
class Codes:
    """A quantized weight: codes_OI within the grid, scales_OG, and for an asymmetric grid
    zeros_OG; codes and zeros in the grid's code_dtype. weight = (code - zero) * scale, both of its
    group.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    grid: Grid
    zeros_OG: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 (O, I)."""
        values_OGI = self.codes_OI.float().reshape(*self.scales_OG.shape, -1)
        if self.zeros_OG is not None:
            values_OGI -= self.zeros_OG.float().unsqueeze(2)
        return values_OGI.mul_(self.scales_OG.float().unsqueeze(2)).flatten(1)


@dataclass(frozen=True)
class Placement:
    """Where a grid lies over a weight: the scale of each group, and the zero points of an
    asymmetric one. The scales are as they will be stored, so that codes fit what a kernel reads.
    """

    grid: Grid
    scales_OG: Tensor
    zeros_OG: Tensor | None = None

    def round(self, weight_OI: Tensor) -> Codes:
        """The nearest code for each weight."""
        steps_OGI = weight_OI.float().reshape(*self.scales_OG.shape, -1)
        steps_OGI = steps_OGI / self.scales_OG.float().unsqueeze(2)
        if self.zeros_OG is not None:
            steps_OGI += self.zeros_OG.float().unsqueeze(2)
        codes_OI = _nearest_(steps_OGI, self.grid).flatten(1).to(self.grid.code_dtype)
        return Codes(codes_OI, self.scales_OG, self.grid, self.zeros_OG)


def _nearest_(steps: Tensor, grid: Grid) -> Tensor:
    """The codes nearest to so many steps, float32 still, in the memory of the argument."""
    if grid.floating:
        return steps.copy_(steps.clamp_(-FP8_MAX, FP8_MAX).to(FP8))
    return steps.round_().clamp_(grid.low, grid.high)


def _grouped(weight_OI: Tensor, grid: Grid) -> Tensor:
    """float32 (O, G, inputs of a group). Raises ValueError when group_size does not divide I."""
    outputs, inputs = weight_OI.shape
    group_size = grid.group_size or inputs
    if inputs % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {inputs} inputs")
    return weight_OI.float().reshape(outputs, inputs // group_size, group_size)


def place(weight_OI: Tensor, grid: Grid, *, scale_dtype: torch.dtype) -> Placement:
    """The grid spread over each group's whole range: its largest magnitude, or its smallest and
    largest value and zero. A group of nothing but zeros gets scale 1.
    """
    return _candidate(_grouped(weight_OI, grid), grid, scale_dtype, shrink=1.0)


def search_placement(
    weight_OI: Tensor,
    grid: Grid,
    importance_I: Tensor,
    *,
    scale_dtype: torch.dtype,
    num_candidates: int = 24,
) -> Placement:
    """The placement with the least rounding error, each input's error weighed by its importance
    (its mean square in the data; not negative). Never worse than `place`, the first candidate.

    Tries ranges from the whole down to 0.6 of it. A symmetric grid reaches one step further down
    than up, so it is also tried with its low end on the group's extreme value; its scale is then
    negative where that value is positive, which kernels do not mind.
    """
    weight_OGI = _grouped(weight_OI, grid)
    # A diagonal would be read from all over its matrix, each time.
    importance_GI = importance_I.float().contiguous().reshape(weight_OGI.shape[1:])
    rows = len(weight_OI)
    if weight_OI.device.type == "cpu":
        rows = max(1, WEIGHTS_CACHED // weight_OI.shape[1])
    found = [
        _search(part_OGI, grid, importance_GI, scale_dtype, num_candidates)
        for part_OGI in torch.split(weight_OGI, rows)
    ]
    scales_OG = torch.cat([placement.scales_OG for placement in found])
    zeros = [placement.zeros_OG for placement in found if placement.zeros_OG is not None]
    return Placement(grid, scales_OG, torch.cat(zeros) if zeros else None)


def _search(
    weight_OGI: Tensor,
    grid: Grid,
    importance_GI: Tensor,
    scale_dtype: torch.dtype,
    num_candidates: int,
) -> Placement:
    best: Placement | None = None
    least_OG = torch.full(weight_OGI.shape[:2], torch.inf, device=weight_OGI.device)
    steps_OGI, codes_OGI = torch.empty_like(weight_OGI), torch.empty_like(weight_OGI)
    for candidate in _candidates(weight_OGI, grid, scale_dtype, num_candidates):
        scale_OG = candidate.scales_OG.float()
        torch.mul(weight_OGI, scale_OG.reciprocal().unsqueeze(2), out=steps_OGI)
        if candidate.zeros_OG is not None:
            steps_OGI += candidate.zeros_OG.float().unsqueeze(2)
        _nearest_(codes_OGI.copy_(steps_OGI), grid)
        errors_OGI = codes_OGI.sub_(steps_OGI).square_().mul_(importance_GI)
        error_OG = errors_OGI.sum(dim=2) * scale_OG.square()
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        best = candidate if best is None else _where(better_OG, candidate, best)
    assert best is not None
    return best


def _candidates(
    weight_OGI: Tensor, grid: Grid, scale_dtype: torch.dtype, count: int
) -> Iterator[Placement]:
    shrinks = [1 - 0.4 * step / count for step in range(count)]
    for shrink in shrinks:
        yield _candidate(weight_OGI, grid, scale_dtype, shrink)
    if grid.symmetric and not grid.floating:
        extreme_OG = weight_OGI.gather(2, weight_OGI.abs().argmax(dim=2, keepdim=True)).squeeze(2)
        for shrink in shrinks:
            yield Placement(grid, _storable(extreme_OG / grid.low * shrink, scale_dtype))


def _candidate(
    weight_OGI: Tensor, grid: Grid, scale_dtype: torch.dtype, shrink: float
) -> Placement:
    if grid.symmetric:
        absmax_OG = weight_OGI.abs().amax(dim=2) * shrink
        steps = FP8_MAX if grid.floating else (2**grid.bits - 1) / 2
        return Placement(grid, _storable(absmax_OG / steps, scale_dtype))
    low_OG = weight_OGI.amin(dim=2).clamp_max(0) * shrink
    high_OG = weight_OGI.amax(dim=2).clamp_min(0) * shrink
    scales_OG = _storable((high_OG - low_OG) / grid.high, scale_dtype)
    zeros_OG = (-low_OG / scales_OG.float()).round().clamp(grid.low, grid.high)
    return Placement(grid, scales_OG, zeros_OG.to(grid.code_dtype))


def _storable(scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to dtype; what is zero or too small for it becomes 1."""
    stored_OG = scales_OG.to(dtype)
    return torch.where(stored_OG == 0, 1.0, stored_OG)


def _where(choice_OG: Tensor, one: Placement, other: Placement) -> Placement:
    zeros_OG = None
    if one.zeros_OG is not None and other.zeros_OG is not None:
        zeros_OG = torch.where(choice_OG, one.zeros_OG, other.zeros_OG)
    return Placement(one.grid, torch.where(choice_OG, one.scales_OG, other.scales_OG), zeros_OG)


def round_to_nearest(weight_OI: Tensor, grid: Grid, *, scale_dtype: torch.dtype) -> Codes:
    """Each weight to the nearest step of the grid over its group's whole range."""
    return place(weight_OI, grid, scale_dtype=scale_dtype).round(weight_OI)


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Unsigned codes (O, I), values 0 .. 2^bits - 1, as int32 (O, I*bits/32): 32/bits along I, the
    first in the lowest bits. Raises ValueError when the last word would not be full.
    """
    outputs, inputs = codes_OI.shape
    per_word = 32 // bits
    if inputs % per_word:
        raise ValueError(f"{inputs} codes of {bits} bits a row do not fill whole 32-bit words")
    shifts = bits * torch.arange(per_word, device=codes_OI.device)
    parts = codes_OI.to(torch.int64).reshape(outputs, inputs // per_word, per_word)
    words_OP = (parts << shifts).sum(dim=2)
    # int64 0..2^32-1 to the int32 of the same bits.
    return torch.where(words_OP >= 2**31, words_OP - 2**32, words_OP).to(torch.int32)


def unpack(words_OP: Tensor, bits: int) -> Tensor:
    """The inverse of pack: uint8 (O, P*32/bits), values 0 .. 2^bits - 1."""
    shifts = bits * torch.arange(32 // bits, device=words_OP.device)
    parts = (words_OP.to(torch.int64).unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return parts.reshape(words_OP.shape[0], -1).to(torch.uint8)


def round_activations(x_TI: Tensor, *, floating: bool = False) -> Tensor:
    """What a W8A8 kernel makes of its input: 8-bit symmetric, one scale a token, in x's dtype."""
    absmax_T1 = x_TI.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-10)
    if floating:
        scales_T1 = absmax_T1 / FP8_MAX
        return ((x_TI.float() / scales_T1).to(FP8).float() * scales_T1).to(x_TI.dtype)
    scales_T1 = absmax_T1 / 127
    return ((x_TI.float() / scales_T1).round().clamp(-128, 127) * scales_T1).to(x_TI.dtype)


def relative_error(weight_OI: Tensor, codes: Codes) -> float:
    """Squared error of the dequantized weight over the weight's own square sum; 0 is perfect."""
    weight_OI = weight_OI.float()
    return (
        (codes.dequantize() - weight_OI).square().sum() / weight_OI.square().sum().clamp_min(1e-30)
    ).item()
