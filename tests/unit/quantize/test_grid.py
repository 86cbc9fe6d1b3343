"""The maths against slow obvious versions and against compressed-tensors' own."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.grid import (
    Grid,
    absmax_scales,
    pack_int4,
    relative_error,
    round_activations,
    round_to_nearest,
    unpack_int4,
)


def random_weight(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def test_scales_of_a_group_span_its_largest_magnitude() -> None:
    weight_OI = torch.tensor([[1.0, -3.0, 0.5, 0.0]])
    scales_OG = absmax_scales(weight_OI, Grid(bits=4, group_size=2))
    assert scales_OG[0].tolist() == pytest.approx([3.0 * 2 / 15, 0.5 * 2 / 15])


def test_an_all_zero_group_stays_zero() -> None:
    codes = round_to_nearest(torch.zeros(2, 4), Grid(4, 2), scale_dtype=torch.float32)
    assert codes.dequantize().eq(0).all()
    assert torch.isfinite(codes.scales_OG).all()


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size=3 does not divide the 4 inputs"):
        absmax_scales(torch.ones(1, 4), Grid(4, 3))


@given(st.integers(0, 2**32), st.sampled_from([(4, 32), (4, None), (8, None), (8, 64)]))
@settings(max_examples=25, deadline=None)
def test_rounding_equals_the_slow_version(seed: int, grid: tuple[int, int | None]) -> None:
    bits, group_size = grid
    weight_OI = random_weight(3, 128, seed)
    codes = round_to_nearest(weight_OI, Grid(bits, group_size), scale_dtype=torch.float32)
    high = 2 ** (bits - 1) - 1
    for row in range(3):
        for column in range(128):
            scale = codes.scales_OG[row, column // (group_size or 128)].item()
            wanted = max(-high - 1, min(high, round(weight_OI[row, column].item() / scale)))
            # Ties may fall either way: float32 division differs from Python's in the last bit.
            assert abs(codes.codes_OI[row, column].item() - wanted) <= 1
            error = abs(codes.dequantize()[row, column].item() - weight_OI[row, column].item())
            assert error <= 0.51 * scale


def test_codes_fit_the_scales_as_stored() -> None:
    weight_OI = random_weight(8, 64)
    codes = round_to_nearest(weight_OI, Grid(4, 32), scale_dtype=torch.bfloat16)
    assert codes.scales_OG.dtype == torch.bfloat16
    step_OI = codes.scales_OG.float().repeat_interleave(32, dim=1)
    inside = (weight_OI / step_OI).abs() <= 7.4
    assert ((codes.dequantize() - weight_OI).abs()[inside] <= 0.501 * step_OI[inside]).all()


def test_more_bits_and_smaller_groups_err_less() -> None:
    weight_OI = random_weight(16, 256)
    errors = [
        relative_error(weight_OI, round_to_nearest(weight_OI, grid, scale_dtype=torch.float32))
        for grid in (Grid(4, None), Grid(4, 128), Grid(4, 32), Grid(8, None))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100  # four bits more are a factor of 256 in squared error


@given(st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_packing_round_trips_and_equals_compressed_tensors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(0, 16, (5, 32), generator=generator)
    words_OP = pack_int4(codes_OI)
    assert unpack_int4(words_OP).equal(codes_OI.to(torch.uint8))
    signed = (codes_OI - 8).to(torch.int8)
    assert words_OP.equal(pack_to_int32(signed, num_bits=4))


def test_activations_are_rounded_token_by_token() -> None:
    x_TI = torch.tensor([[127.0, 0.4, -127.0], [0.0127, 0.00004, 0.0]])
    rounded = round_activations(x_TI)
    assert rounded[0].tolist() == pytest.approx([127.0, 0.0, -127.0])
    assert rounded[1].tolist() == pytest.approx([0.0127, 0.0, 0.0], abs=1e-6)
