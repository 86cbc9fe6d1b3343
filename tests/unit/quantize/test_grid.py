"""The maths against slow obvious versions and against compressed-tensors' own."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from packhorse.quantize.numerics.grid import (
    FP8,
    QuantizationArgs,
    QuantizationParameters,
    QuantizedWeight,
    minmax_parameters,
    pack,
    relative_error,
    round_activations,
    round_to_nearest,
    search_parameters,
    unpack,
)

SEEDS = st.integers(0, 2**32)
FLOATS = QuantizationArgs(8, floating=True)
GRIDS = [
    QuantizationArgs(bits, group_size, symmetric)
    for bits in (4, 8)
    for group_size in (32, None)
    for symmetric in (True, False)
]


def random_weight(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def weighed_errors(
    weight_OI: torch.Tensor, codes: QuantizedWeight, importance_I: torch.Tensor
) -> list[float]:
    """Of each group, one after the other."""
    errors_OI = (codes.dequantize() - weight_OI).square() * importance_I
    return errors_OI.reshape(codes.scales_OG.numel(), -1).sum(dim=1).tolist()


def test_symmetric_steps_span_the_largest_magnitude_of_a_group() -> None:
    weight_OI = torch.tensor([[1.0, -3.0, 0.5, 0.0]])
    parameters = minmax_parameters(weight_OI, QuantizationArgs(4, 2), scale_dtype=torch.float32)
    assert parameters.scales_OG[0].tolist() == pytest.approx([3.0 * 2 / 15, 0.5 * 2 / 15])
    assert parameters.zeros_OG is None


def test_asymmetric_steps_span_smallest_to_largest_and_zero() -> None:
    weight_OI = torch.tensor([[-1.0, 2.0, 3.0, 6.0]])
    parameters = minmax_parameters(
        weight_OI, QuantizationArgs(4, 2, symmetric=False), scale_dtype=torch.float32
    )
    assert parameters.scales_OG[0].tolist() == pytest.approx([3 / 15, 6 / 15])
    assert parameters.zeros_OG is not None
    assert parameters.zeros_OG.tolist() == [[5, 0]]
    assert parameters.round(weight_OI).codes_OI.tolist() == [[0, 15, 8, 15]]


def test_float_steps_put_the_largest_magnitude_on_the_largest_float() -> None:
    codes = round_to_nearest(torch.tensor([[4.48, -2.24, 0.0]]), FLOATS, scale_dtype=torch.float32)
    assert codes.codes_OI.dtype == FP8
    assert codes.codes_OI.float().tolist() == [[448.0, -224.0, 0.0]]


@pytest.mark.parametrize("args", [*GRIDS, FLOATS], ids=str)
def test_an_all_zero_group_stays_zero(args: QuantizationArgs) -> None:
    codes = round_to_nearest(torch.zeros(2, 64), args, scale_dtype=torch.float32)
    assert codes.dequantize().eq(0).all()
    assert torch.isfinite(codes.scales_OG).all()


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size=3 does not divide the 4 inputs"):
        minmax_parameters(torch.ones(1, 4), QuantizationArgs(4, 3), scale_dtype=torch.float32)


@given(SEEDS, st.sampled_from(GRIDS))
@settings(max_examples=25, deadline=None)
def test_rounding_equals_the_slow_version(seed: int, args: QuantizationArgs) -> None:
    weight_OI = random_weight(3, 128, seed)
    codes = round_to_nearest(weight_OI, args, scale_dtype=torch.float32)
    dequantized_OI = codes.dequantize()
    for row in range(3):
        for column in range(128):
            group = column // (args.group_size or 128)
            scale = codes.scales_OG[row, group].item()
            zero = 0 if codes.zeros_OG is None else codes.zeros_OG[row, group].item()
            weight = weight_OI[row, column].item()
            wanted = max(args.low, min(args.high, round(weight / scale) + zero))
            code = codes.codes_OI[row, column].item()
            # Ties may fall either way: float32 division differs from Python's in the last bit.
            assert abs(code - wanted) <= 1
            assert dequantized_OI[row, column].item() == pytest.approx((code - zero) * scale)
            # A zero point is rounded too, so the ends of the range may lie half a step off.
            assert abs(dequantized_OI[row, column].item() - weight) <= (
                0.51 if args.symmetric else 1.01
            ) * abs(scale)


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_floats_are_within_a_sixteenth(seed: int) -> None:
    """Three bits of mantissa: half a step is 1/16 of the power of two below."""
    weight_OI = random_weight(3, 64, seed)
    codes = round_to_nearest(weight_OI, FLOATS, scale_dtype=torch.float32)
    # Below 2^-6 the floats are evenly spaced, 2^-9 apart.
    bound_OI = torch.maximum(weight_OI.abs() / 16, codes.scales_OG * 2**-10) * 1.001
    assert ((codes.dequantize() - weight_OI).abs() <= bound_OI).all()


def test_codes_fit_the_scales_as_stored() -> None:
    weight_OI = random_weight(8, 64)
    codes = round_to_nearest(weight_OI, QuantizationArgs(4, 32), scale_dtype=torch.bfloat16)
    assert codes.scales_OG.dtype == torch.bfloat16
    step_OI = codes.scales_OG.float().repeat_interleave(32, dim=1)
    inside = (weight_OI / step_OI).abs() <= 7.4
    assert ((codes.dequantize() - weight_OI).abs()[inside] <= 0.501 * step_OI[inside]).all()


def test_more_bits_and_smaller_groups_err_less() -> None:
    weight_OI = random_weight(16, 256)
    errors = [
        relative_error(weight_OI, round_to_nearest(weight_OI, args, scale_dtype=torch.float32))
        for args in (
            QuantizationArgs(4, None),
            QuantizationArgs(4, 128),
            QuantizationArgs(4, 32),
            QuantizationArgs(8, None),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100  # four bits more are a factor of 256 in squared error


def test_a_zero_point_helps_where_weights_lie_to_one_side() -> None:
    weight_OI = random_weight(16, 256) + 2
    symmetric, asymmetric = (
        relative_error(
            weight_OI,
            round_to_nearest(weight_OI, QuantizationArgs(4, 32, sym), scale_dtype=torch.float32),
        )
        for sym in (True, False)
    )
    assert asymmetric < symmetric


@given(SEEDS, st.sampled_from([*GRIDS, FLOATS]), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_searched_parameters_are_never_worse(
    seed: int, args: QuantizationArgs, dtype: torch.dtype
) -> None:
    weight_OI = random_weight(4, 64, seed)
    importance_I = random_weight(1, 64, seed + 1)[0].exp()
    plain = minmax_parameters(weight_OI, args, scale_dtype=dtype).round(weight_OI)
    searched = search_parameters(weight_OI, args, importance_I, scale_dtype=dtype).round(weight_OI)
    assert searched.scales_OG.dtype == dtype
    pairs = zip(
        weighed_errors(weight_OI, searched, importance_I),
        weighed_errors(weight_OI, plain, importance_I),
        strict=True,
    )
    # The two sums run in another order here than in the search.
    assert all(found <= first * (1 + 1e-5) for found, first in pairs)


def test_a_search_gains_where_it_matters() -> None:
    """One outlier that the data never excites: a narrower range suits the rest."""
    weight_OI = random_weight(8, 64)
    weight_OI[:, 0] = 8.0
    importance_I = torch.ones(64)
    importance_I[0] = 0.0
    plain = round_to_nearest(weight_OI, QuantizationArgs(4), scale_dtype=torch.float32)
    searched = search_parameters(
        weight_OI, QuantizationArgs(4), importance_I, scale_dtype=torch.float32
    )
    found = weighed_errors(weight_OI, searched.round(weight_OI), importance_I)
    assert sum(found) < 0.6 * sum(weighed_errors(weight_OI, plain, importance_I))


def test_a_negative_scale_reaches_one_step_further_up() -> None:
    weight_OI = torch.tensor([[8.0, -7.0, 3.0, 1.0]])
    codes = QuantizationParameters(QuantizationArgs(4), torch.tensor([[-1.0]])).round(weight_OI)
    assert codes.codes_OI.tolist() == [[-8, 7, -3, -1]]
    found = search_parameters(
        weight_OI, QuantizationArgs(4), torch.ones(4), scale_dtype=torch.float32
    )
    assert found.round(weight_OI).dequantize().equal(weight_OI)


@given(SEEDS, st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_packing_round_trips_and_equals_compressed_tensors(
    seed: int, bits: int, outputs: int, words: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes_OI = torch.randint(0, 2**bits, (outputs, words * 32 // bits), generator=generator)
    words_OP = pack(codes_OI, bits)
    assert words_OP.dtype == torch.int32
    assert unpack(words_OP, bits).equal(codes_OI.to(torch.uint8))
    signed = (codes_OI - 2 ** (bits - 1)).to(torch.int8)
    assert words_OP.equal(pack_to_int32(signed, num_bits=bits))


def test_packing_refuses_half_a_word() -> None:
    with pytest.raises(ValueError, match="12 codes of 4 bits a row do not fill whole"):
        pack(torch.zeros(1, 12, dtype=torch.int64), 4)


def test_activations_are_rounded_token_by_token() -> None:
    x_TI = torch.tensor([[127.0, 0.4, -127.0], [0.0127, 0.00004, 0.0]])
    rounded = round_activations(x_TI)
    assert rounded[0].tolist() == pytest.approx([127.0, 0.0, -127.0])
    assert rounded[1].tolist() == pytest.approx([0.0127, 0.0, 0.0], abs=1e-6)


def test_float_activations_keep_small_values_beside_large_ones() -> None:
    x_TI = torch.tensor([[448.0, 1.0, 0.3], [0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    rounded = round_activations(x_TI, floating=True)
    assert rounded.dtype == torch.bfloat16
    assert rounded[0].tolist() == pytest.approx([448.0, 1.0, 0.3], rel=1 / 16)
    assert rounded[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_further_from_its_code_than_half_a_step(bits: int) -> None:
    """At both ends of a group too, which a zero point that is rounded one way only would cut."""
    generator = torch.Generator().manual_seed(0)
    shift_O1 = torch.linspace(-2, 2, 64)[:, None]
    weight_OI = torch.randn(64, 128, generator=generator) + shift_O1
    codes = round_to_nearest(
        weight_OI, QuantizationArgs(bits, 32, symmetric=False), scale_dtype=torch.float32
    )
    error_OGI = (codes.dequantize() - weight_OI).reshape(*codes.scales_OG.shape, -1)
    steps_OGI = error_OGI.abs() / codes.scales_OG.unsqueeze(2)
    assert steps_OGI.max() <= 0.5 + 1e-4
