"""The maths of the calibrated methods against slow and certain versions of the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from packhorse.quantize.calibration.statistics import InputStatistics
from packhorse.quantize.methods import awq, gptq, int8, smoothing
from packhorse.quantize.methods.error_compensation import compensate
from packhorse.quantize.model.families import FAMILIES
from packhorse.quantize.numerics import cholesky
from packhorse.quantize.numerics.grid import (
    QuantizationArgs,
    QuantizationParameters,
    Scheme,
    minmax_parameters,
    round_to_nearest,
    search_parameters,
)

ARGS = QuantizationArgs(4)
SCALES = torch.float32


def hessian(inputs: int, seed: int, *, tokens: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    return x.T @ x / tokens


def weight(outputs: int, inputs: int, seed: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed + 1000))


def solved_naively(
    weight_OI: Tensor, hessian_II: Tensor, parameters: QuantizationParameters
) -> Tensor:
    """After each rounded column, the free ones are solved anew by least squares; same damping and
    order as the real one.
    """
    args = parameters.args
    damped = hessian_II.double()
    damped = damped + gptq.DAMPING[0] * damped.diagonal().mean() * torch.eye(len(damped))
    order = hessian_II.diagonal().argsort(descending=True, stable=True).tolist()
    scale = parameters.scales_OG.double()[:, 0]
    original = weight_OI.double()
    current, codes = original.clone(), torch.zeros_like(original)
    for position, column in enumerate(order):
        codes[:, column] = (current[:, column] / scale).round().clamp(args.low, args.high)
        current[:, column] = codes[:, column] * scale
        fixed, free = order[: position + 1], order[position + 1 :]
        if free:
            error = current[:, fixed] - original[:, fixed]
            pull = torch.linalg.solve(damped[free][:, free], damped[free][:, fixed] @ error.T)
            current[:, free] = original[:, free] - pull.T
    return codes.to(torch.int8)


def lost(weight_OI: Tensor, dequantized_OI: Tensor, hessian_II: Tensor) -> Tensor:
    error = (dequantized_OI - weight_OI).double()
    return ((error @ hessian_II.double()) * error).sum(dim=1)


@pytest.mark.parametrize("seed", range(20))
def test_gptq_equals_solving_anew_after_every_column(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = 2 + seed % 7
    weight_OI, hessian_II = weight(5, inputs, seed), hessian(inputs, seed)
    # The largest weight lies half-way between two steps of the range; a tie may fall either way.
    parameters = QuantizationParameters(
        ARGS, minmax_parameters(weight_OI, ARGS, scale_dtype=SCALES).scales_OG * 1.03
    )
    monkeypatch.setattr(gptq, "_better_rows", lambda *given: given[3])  # as they were solved
    codes = gptq.solve(weight_OI, hessian_II, parameters).weight
    assert torch.equal(codes.codes_OI, solved_naively(weight_OI, hessian_II, parameters))


def test_runner_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, hessian_II = weight(8, 96, 0), hessian(96, 0, tokens=512)
    parameters = minmax_parameters(weight_OI, ARGS, scale_dtype=SCALES)
    whole = gptq.solve(weight_OI, hessian_II, parameters).weight.codes_OI
    monkeypatch.setattr(gptq, "BLOCK", 16)
    parts = gptq.solve(weight_OI, hessian_II, parameters).weight.codes_OI
    assert (whole != parts).float().mean() < 0.01  # sums in another order; ties may fall otherwise


@pytest.mark.parametrize("seed", range(10))
def test_gptq_lies_between_the_optimum_and_rounding(seed: int) -> None:
    inputs = 2 + seed % 3
    weight_OI, hessian_II = weight(3, inputs, seed), hessian(inputs, seed)
    parameters = minmax_parameters(weight_OI, ARGS, scale_dtype=SCALES)
    found = gptq.solve(weight_OI, hessian_II, parameters).weight
    rounded = parameters.round(weight_OI)
    error_O = lost(weight_OI, found.dequantize(), hessian_II)
    assert (error_O <= lost(weight_OI, rounded.dequantize(), hessian_II) + 1e-9).all()
    every = torch.tensor(list(itertools.product(range(ARGS.low, ARGS.high + 1), repeat=inputs)))
    for row in range(3):
        candidates = every * parameters.scales_OG[row, 0]
        best = lost(weight_OI[row].expand(len(every), -1), candidates, hessian_II).min()
        assert error_O[row] >= best - 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_gptq_is_never_worse_than_rounding(seed: int) -> None:
    weight_OI, hessian_II = weight(16, 64, seed), hessian(64, seed, tokens=256)
    parameters = minmax_parameters(weight_OI, QuantizationArgs(4, 32), scale_dtype=SCALES)
    found = lost(
        weight_OI, gptq.solve(weight_OI, hessian_II, parameters).weight.dequantize(), hessian_II
    )
    nearest = lost(weight_OI, parameters.round(weight_OI).dequantize(), hessian_II)
    assert (found <= nearest * (1 + 1e-5)).all()
    assert found.sum() < 0.7 * nearest.sum()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_inputs_that_are_always_zero_change_nothing(scale: float) -> None:
    """However small the others are."""
    weight_OI, hessian_II = weight(16, 64, 0), hessian(64, 0, tokens=256) * scale**2
    dead = torch.arange(0, 64, 5)
    hessian_II[dead] = hessian_II[:, dead] = 0
    parameters = minmax_parameters(weight_OI, QuantizationArgs(4, 32), scale_dtype=SCALES)
    codes = gptq.solve(weight_OI, hessian_II, parameters).weight
    found = lost(weight_OI, codes.dequantize(), hessian_II)
    nearest = lost(weight_OI, parameters.round(weight_OI).dequantize(), hessian_II)
    assert (found <= nearest * (1 + 1e-4)).all()
    assert found.sum() < 0.8 * nearest.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_rounding_where_inputs_are_independent(symmetric: bool) -> None:
    weight_OI = weight(16, 64, 0)
    parameters = minmax_parameters(
        weight_OI, QuantizationArgs(4, 32, symmetric), scale_dtype=SCALES
    )
    found = gptq.solve(weight_OI, torch.eye(64), parameters).weight
    assert torch.equal(found.codes_OI, parameters.round(weight_OI).codes_OI)


def test_an_input_that_is_always_zero_does_no_harm() -> None:
    weight_OI, hessian_II = weight(4, 32, 0), hessian(32, 0)
    hessian_II[5] = hessian_II[:, 5] = 0
    rounded = gptq.solve(
        weight_OI, hessian_II, minmax_parameters(weight_OI, ARGS, scale_dtype=SCALES)
    )
    assert rounded.note is None
    assert rounded.weight.dequantize().isfinite().all()


def test_a_hopeless_hessian_is_recorded_and_rounded() -> None:
    weight_OI = weight(4, 32, 0)
    parameters = minmax_parameters(weight_OI, ARGS, scale_dtype=SCALES)
    rounded = gptq.solve(weight_OI, torch.full((32, 32), torch.nan), parameters)
    assert rounded.note == "rounded to nearest: Hessian not invertible"
    assert torch.equal(rounded.weight.codes_OI, parameters.round(weight_OI).codes_OI)


def test_a_stubborn_hessian_climbs_the_ladder() -> None:
    """Indefinite by less than a tenth of its diagonal: rounding errors of few tokens look so."""
    hessian_II = torch.eye(32)
    hessian_II[0, 1] = hessian_II[1, 0] = 1.05
    weight_OI = weight(4, 32, 0)
    rounded = gptq.solve(
        weight_OI, hessian_II, minmax_parameters(weight_OI, ARGS, scale_dtype=SCALES)
    )
    assert rounded.note == "damped by 0.1 of the mean diagonal"


def test_importance_decides_where_a_range_is_cut() -> None:
    """An outlier on an input that hardly occurs may be cut off; on a busy one it may not."""
    weight_OI = weight(1, 32, 0)
    weight_OI[0, 7] = 20.0
    rare, busy = torch.ones(32), torch.ones(32)
    rare[7], busy[7] = 1e-6, 1e3
    cut, kept = (
        search_parameters(weight_OI, ARGS, importance, scale_dtype=SCALES).round(weight_OI)
        for importance in (rare, busy)
    )
    assert cut.dequantize()[0, 7] < 0.8 * 20
    assert kept.dequantize()[0, 7] > 0.95 * 20


def test_factors_and_solutions_are_made_in_place() -> None:
    square, right = hessian(24, 0), weight(5, 24, 0)
    wanted = torch.linalg.solve(square.double(), right.T.double()).T.float()
    place, place_of_right = square.data_ptr(), right.data_ptr()
    lower = cholesky.factor_(square)
    assert lower is not None
    torch.testing.assert_close(lower, torch.linalg.cholesky(hessian(24, 0)))
    solved = cholesky.solve_(right, lower)
    torch.testing.assert_close(solved, wanted, rtol=1e-2, atol=1e-4)
    assert (lower.data_ptr(), solved.data_ptr()) == (place, place_of_right)


@pytest.mark.parametrize("broken", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("at", [(0, 0), (5, 5), (5, 2)])
def test_what_is_not_positive_definite_has_no_factor(broken: float, at: tuple[int, int]) -> None:
    square = torch.eye(8)
    square[at] = square[at[::-1]] = 4 * broken
    assert cholesky.factor_(square) is None


def statistics_of(
    x_TI: Tensor, deviation: Tensor | None = None, residual: Tensor | None = None
) -> InputStatistics:
    statistics = InputStatistics()
    half = len(x_TI) // 2
    for part in (slice(0, half), slice(half, None)):
        statistics.add(
            x_TI[part],
            None if deviation is None else deviation[part],
            None if residual is None else residual[part],
        )
    return statistics


def test_running_means_are_means() -> None:
    x, y = weight(100, 8, 0), weight(100, 8, 1)
    m = weight(100, 3, 2)
    statistics = statistics_of(x, y, m)
    assert statistics.input_deviation_II is not None
    assert statistics.output_residual_OI is not None
    torch.testing.assert_close(statistics.hessian_II, x.T @ x / 100)
    torch.testing.assert_close(statistics.input_deviation_II, y.T @ x / 100)
    torch.testing.assert_close(statistics.output_residual_OI, m.T @ x / 100)
    torch.testing.assert_close(statistics.absmax_I, x.abs().amax(dim=0))
    torch.testing.assert_close(statistics.absmean_I, x.abs().mean(dim=0))


@pytest.mark.parametrize("size", [8, 300, 1025])
def test_a_hessian_in_strips_is_whole(size: int) -> None:
    x = weight(100, size, 0)
    statistics = statistics_of(x)
    torch.testing.assert_close(statistics.hessian_II, x.T @ x / 100)
    more = weight(50, size, 1)
    statistics.add(more)
    both = torch.cat([x, more])
    torch.testing.assert_close(statistics.hessian_II, both.T @ both / 150)


@pytest.mark.parametrize("alone", [False, True], ids=["input deviation", "output residual"])
def test_compensation_takes_back_what_follows_linearly_from_the_inputs(alone: bool) -> None:
    weight_OI, x = weight(4, 8, 0), weight(400, 8, 1)
    distorted = x @ (torch.eye(8) + 0.3 * weight(8, 8, 2))
    deviation = x - distorted
    statistics = (
        statistics_of(distorted, None, deviation @ weight_OI.T)
        if alone
        else statistics_of(distorted, deviation)
    )
    compensated, note = compensate(weight_OI, statistics)
    assert note is None
    before = (x @ weight_OI.T - distorted @ weight_OI.T).square().mean()
    after = (x @ weight_OI.T - distorted @ compensated.T).square().mean()
    assert after < 0.02 * before


def test_a_compensation_that_cannot_be_had_is_noted() -> None:
    weight_OI, x = weight(4, 8, 0), weight(400, 8, 1)
    statistics = statistics_of(x, torch.ones_like(x))
    statistics.hessian_II.fill_(torch.nan)
    same, note = compensate(weight_OI, statistics)
    assert same is weight_OI
    assert note == "not corrected for earlier errors: Hessian not invertible"


def tiny_block() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64, head_dim=32, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.mark.parametrize("method", ["awq", "int8"])
@torch.inference_mode()
def test_smoothing_leaves_the_logits_alone(method: str) -> None:
    model = tiny_block()
    family = FAMILIES["llama"]
    ids = torch.arange(1, 33)[None]
    before = model(ids).logits
    block = model.model.layers[0]
    untouched = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    seen = {}
    for group in family.fused:
        width = block.get_submodule(group[0]).weight.shape[1]
        outliers = torch.exp(torch.randn(width, generator=generator) * 2)
        seen[group[0]] = statistics_of(torch.randn(256, width, generator=generator) * outliers)
    methods = {
        "awq": awq.Awq(Scheme(QuantizationArgs(4, 32, symmetric=False))),
        "int8": int8.Int8(Scheme(QuantizationArgs(8), 8)),
    }
    linears = {name for group in family.fused for name in group}
    methods[method].prepare(block, family, lambda: seen, linears)
    changed = [
        n for n, tensor in block.state_dict().items() if not torch.equal(tensor, untouched[n])
    ]
    assert len(changed) > 8, "outliers like these must be worth moving"
    assert (model(ids).logits - before).square().mean() < 1e-10


def test_norms_with_an_offset_are_smoothed_as_they_multiply() -> None:
    from dataclasses import replace

    block = tiny_block().model.layers[0]  # type: ignore[union-attr,index]
    family = replace(FAMILIES["llama"], norm_offset=1.0)
    before = block.input_layernorm.weight.detach() + 1
    pair = next(smoothing.pairs(block, family))
    smoothing.apply(block, family, pair, torch.full((64,), 2.0))
    torch.testing.assert_close(block.input_layernorm.weight.data + 1, before / 2)


def test_useless_scales_are_not_used() -> None:
    """Inputs all alike: nothing to gain by scaling, and inputs that are endless are left alone."""
    weights = [weight(32, 64, 0)]
    alike = statistics_of(
        torch.ones(64, 64).sign() * (torch.arange(64 * 64).reshape(64, 64) % 2 * 2 - 1)
    )
    args = QuantizationArgs(4, 32, symmetric=False)
    scales = awq.search_scales(weights, alike, args)
    base = awq._loss(weights, None, alike.hessian_II, args)
    assert scales is None or awq._loss(weights, scales, alike.hessian_II, args) < base
    endless = statistics_of(torch.full((64, 64), torch.inf))
    assert awq.search_scales(weights, endless, args) is None


@pytest.mark.parametrize("seed", range(4))
def test_awq_is_better_than_rounding_on_outliers(seed: int) -> None:
    args = QuantizationArgs(4, 32, symmetric=False)
    weights = [weight(48, 64, seed)]
    x = weight(512, 64, seed + 50) * torch.exp(weight(1, 64, seed + 99) * 1.5)
    statistics = statistics_of(x)
    scales = awq.search_scales(weights, statistics, args)
    assert scales is not None
    plain = round_to_nearest(weights[0], args, scale_dtype=SCALES).dequantize()
    scaled = round_to_nearest(weights[0] * scales, args, scale_dtype=SCALES).dequantize() / scales
    errors = [lost(weights[0], found, statistics.hessian_II).sum() for found in (scaled, plain)]
    assert errors[0] < 0.7 * errors[1]
