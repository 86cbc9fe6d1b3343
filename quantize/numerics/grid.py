"""The arithmetic of weight quantization: scales, zero points, rounding, dequantizing, bit packing.

Functions take tensors and return tensors; the module imports torch alone.

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
"""Weights per block of rows in a CPU's search for scales. A block of this size, one megabyte, stays
in the CPU's caches while the search tries 48 scales, which is six times as fast as all rows at
once."""


@dataclass(frozen=True)
class QuantizationArgs:
    """The values that a quantized weight may take: 2^bits integers times a scale, or 8-bit floats
    times a scale. The name and most fields are those of compressed-tensors.

    Symmetric integers are signed. Asymmetric integers are 0 .. 2^bits - 1, with a zero point.
    group_size counts the inputs that share one scale; None means one scale for each output.
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
        """The dtype of codes and of zero points."""
        if self.floating:
            return FP8
        return torch.int8 if self.symmetric else torch.uint8


@dataclass(frozen=True)
class Scheme:
    """How linear layers are stored and computed: the quantization of their weights, and the bits
    that the engine rounds their inputs to (16: no rounding; 8: one scale per token).
    """

    weights: QuantizationArgs
    activation_bits: int = 16

    def __str__(self) -> str:
        if self.weights.floating:
            return "FP8 (W8A8)"
        return f"W{self.weights.bits}A{self.activation_bits}"


@dataclass(frozen=True)
class QuantizedWeight:
    """The stored form of one weight: codes_OI, scales_OG and, for asymmetric args, zeros_OG. Codes
    and zero points have the dtype args.code_dtype. weight = (code - zero) * scale, with the zero
    point and the scale of the code's group.
    """

    codes_OI: Tensor
    scales_OG: Tensor
    args: QuantizationArgs
    zeros_OG: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for: float32 (O, I)."""
        values_OGI = self.codes_OI.float().reshape(*self.scales_OG.shape, -1)
        if self.zeros_OG is not None:
            values_OGI -= self.zeros_OG.float().unsqueeze(2)
        return values_OGI.mul_(self.scales_OG.float().unsqueeze(2)).flatten(1)


@dataclass(frozen=True)
class QuantizationParameters:
    """The scale of each group of a weight and, for asymmetric args, its zero point. The scales are
    rounded to the dtype in which they are stored, so that codes fit the scales a kernel reads.
    """

    args: QuantizationArgs
    scales_OG: Tensor
    zeros_OG: Tensor | None = None

    def round(self, weight_OI: Tensor) -> QuantizedWeight:
        """Quantize each weight to the nearest code."""
        steps_OGI = weight_OI.float().reshape(*self.scales_OG.shape, -1)
        steps_OGI = steps_OGI / self.scales_OG.float().unsqueeze(2)
        if self.zeros_OG is not None:
            steps_OGI += self.zeros_OG.float().unsqueeze(2)
        codes_OI = _nearest_(steps_OGI, self.args).flatten(1).to(self.args.code_dtype)
        return QuantizedWeight(codes_OI, self.scales_OG, self.args, self.zeros_OG)


def _nearest_(steps: Tensor, args: QuantizationArgs) -> Tensor:
    """Round weights divided by their scales to the nearest codes. In place; the dtype stays
    float32.
    """
    if args.floating:
        return steps.copy_(steps.clamp_(-FP8_MAX, FP8_MAX).to(FP8))
    return steps.round_().clamp_(args.low, args.high)


def _grouped(weight_OI: Tensor, args: QuantizationArgs) -> Tensor:
    """The weight by groups: float32 (O, G, inputs of a group). Raises ValueError when group_size
    does not divide I.
    """
    outputs, inputs = weight_OI.shape
    group_size = args.group_size or inputs
    if inputs % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {inputs} inputs")
    return weight_OI.float().reshape(outputs, inputs // group_size, group_size)


def minmax_parameters(
    weight_OI: Tensor, args: QuantizationArgs, *, scale_dtype: torch.dtype
) -> QuantizationParameters:
    """Parameters that cover each group's whole range: its largest magnitude (symmetric), or its
    smallest and largest value and zero (asymmetric). A group of zeros gets scale 1.
    """
    return _candidate(_grouped(weight_OI, args), args, scale_dtype, shrink=1.0)


def search_parameters(
    weight_OI: Tensor,
    args: QuantizationArgs,
    importance_I: Tensor,
    *,
    scale_dtype: torch.dtype,
    num_candidates: int = 24,
) -> QuantizationParameters:
    """The parameters with the least squared rounding error, each input's error weighted by its
    importance (the input's mean square in the calibration data; not negative). Never worse than
    `minmax_parameters`, which is the first candidate.

    Candidates clip the range, from the whole range down to 0.6 of it. Symmetric codes reach one
    step further down than up, so the search also tries scales that put the lowest code on the
    group's extreme value. Such a scale is negative where that value is positive, which kernels
    accept.
    """
    weight_OGI = _grouped(weight_OI, args)
    # A diagonal is a strided view: each use would read from all over its matrix.
    importance_GI = importance_I.float().contiguous().reshape(weight_OGI.shape[1:])
    rows = len(weight_OI)
    if weight_OI.device.type == "cpu":
        rows = max(1, WEIGHTS_CACHED // weight_OI.shape[1])
    found = [
        _search(part_OGI, args, importance_GI, scale_dtype, num_candidates)
        for part_OGI in torch.split(weight_OGI, rows)
    ]
    scales_OG = torch.cat([parameters.scales_OG for parameters in found])
    zeros = [parameters.zeros_OG for parameters in found if parameters.zeros_OG is not None]
    return QuantizationParameters(args, scales_OG, torch.cat(zeros) if zeros else None)


def _search(
    weight_OGI: Tensor,
    args: QuantizationArgs,
    importance_GI: Tensor,
    scale_dtype: torch.dtype,
    num_candidates: int,
) -> QuantizationParameters:
    best: QuantizationParameters | None = None
    least_OG = torch.full(weight_OGI.shape[:2], torch.inf, device=weight_OGI.device)
    steps_OGI, codes_OGI = torch.empty_like(weight_OGI), torch.empty_like(weight_OGI)
    for candidate in _candidates(weight_OGI, args, scale_dtype, num_candidates):
        scale_OG = candidate.scales_OG.float()
        torch.mul(weight_OGI, scale_OG.reciprocal().unsqueeze(2), out=steps_OGI)
        if candidate.zeros_OG is not None:
            steps_OGI += candidate.zeros_OG.float().unsqueeze(2)
        _nearest_(codes_OGI.copy_(steps_OGI), args)
        errors_OGI = codes_OGI.sub_(steps_OGI).square_().mul_(importance_GI)
        error_OG = errors_OGI.sum(dim=2) * scale_OG.square()
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        best = candidate if best is None else _where(better_OG, candidate, best)
    assert best is not None
    return best


def _candidates(
    weight_OGI: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype, count: int
) -> Iterator[QuantizationParameters]:
    shrinks = [1 - 0.4 * step / count for step in range(count)]
    for shrink in shrinks:
        yield _candidate(weight_OGI, args, scale_dtype, shrink)
    if args.symmetric and not args.floating:
        extreme_OG = weight_OGI.gather(2, weight_OGI.abs().argmax(dim=2, keepdim=True)).squeeze(2)
        for shrink in shrinks:
            yield QuantizationParameters(
                args, _storable(extreme_OG / args.low * shrink, scale_dtype)
            )


def _candidate(
    weight_OGI: Tensor, args: QuantizationArgs, scale_dtype: torch.dtype, shrink: float
) -> QuantizationParameters:
    if args.symmetric:
        absmax_OG = weight_OGI.abs().amax(dim=2) * shrink
        steps = FP8_MAX if args.floating else (2**args.bits - 1) / 2
        return QuantizationParameters(args, _storable(absmax_OG / steps, scale_dtype))
    low_OG = weight_OGI.amin(dim=2).clamp_max(0) * shrink
    high_OG = weight_OGI.amax(dim=2).clamp_min(0) * shrink
    scales_OG = _storable((high_OG - low_OG) / args.high, scale_dtype)
    zeros_OG = (-low_OG / scales_OG.float()).round().clamp(args.low, args.high)
    return QuantizationParameters(args, scales_OG, zeros_OG.to(args.code_dtype))


def _storable(scales_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales in the dtype that is stored; a scale that is 0 in this dtype becomes 1."""
    stored_OG = scales_OG.to(dtype)
    return torch.where(stored_OG == 0, 1.0, stored_OG)


def _where(
    choice_OG: Tensor, one: QuantizationParameters, other: QuantizationParameters
) -> QuantizationParameters:
    zeros_OG = None
    if one.zeros_OG is not None and other.zeros_OG is not None:
        zeros_OG = torch.where(choice_OG, one.zeros_OG, other.zeros_OG)
    return QuantizationParameters(
        one.args, torch.where(choice_OG, one.scales_OG, other.scales_OG), zeros_OG
    )


def round_to_nearest(
    weight_OI: Tensor, args: QuantizationArgs, *, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Quantize each weight to the nearest code, with `minmax_parameters`."""
    return minmax_parameters(weight_OI, args, scale_dtype=scale_dtype).round(weight_OI)


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes (O, I), values 0 .. 2^bits - 1, into int32 words (O, I*bits/32): 32/bits
    codes per word along I, the first in the lowest bits. Raises ValueError when the codes of a row
    do not fill whole words.
    """
    outputs, inputs = codes_OI.shape
    per_word = 32 // bits
    if inputs % per_word:
        raise ValueError(f"{inputs} codes of {bits} bits a row do not fill whole 32-bit words")
    shifts = bits * torch.arange(per_word, device=codes_OI.device)
    parts = codes_OI.to(torch.int64).reshape(outputs, inputs // per_word, per_word)
    words_OP = (parts << shifts).sum(dim=2)
    # From int64, 0 .. 2^32 - 1, to the int32 with the same bits.
    return torch.where(words_OP >= 2**31, words_OP - 2**32, words_OP).to(torch.int32)


def unpack(words_OP: Tensor, bits: int) -> Tensor:
    """The inverse of pack: uint8 (O, P*32/bits), values 0 .. 2^bits - 1."""
    shifts = bits * torch.arange(32 // bits, device=words_OP.device)
    parts = (words_OP.to(torch.int64).unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return parts.reshape(words_OP.shape[0], -1).to(torch.uint8)


def round_activations(x_TI: Tensor, *, floating: bool = False) -> Tensor:
    """Quantize and dequantize inputs as a W8A8 kernel does: 8 bits, symmetric, one scale per token.
    The result has x's dtype.
    """
    absmax_T1 = x_TI.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-10)
    if floating:
        scales_T1 = absmax_T1 / FP8_MAX
        return ((x_TI.float() / scales_T1).to(FP8).float() * scales_T1).to(x_TI.dtype)
    scales_T1 = absmax_T1 / 127
    return ((x_TI.float() / scales_T1).round().clamp(-128, 127) * scales_T1).to(x_TI.dtype)


def relative_error(weight_OI: Tensor, codes: QuantizedWeight) -> float:
    """Squared error of the dequantized weight over the weight's sum of squares; 0 is exact."""
    weight_OI = weight_OI.float()
    return (
        (codes.dequantize() - weight_OI).square().sum() / weight_OI.square().sum().clamp_min(1e-30)
    ).item()
