"""Sensitivity of the model to the quantization of each fused group of layers.

The sensitivity of a group is the KL divergence at the model's output when this group alone is
quantized. The hidden states of all models with one quantized group run through the blocks together,
so that each block is read once. Called by run.py; methods/bit_allocation.py spends bits by the
results.
"""

# Shapes: O = outputs, I = inputs, R = rows, T = tokens, V = vocabulary.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from packhorse.quantize import methods
from packhorse.quantize.calibration.activation_store import ActivationStore, Key
from packhorse.quantize.calibration.block_loader import count_blocks, load_blocks
from packhorse.quantize.calibration.hooks import fast_matmul
from packhorse.quantize.calibration.runner import Runner, RunningBlock
from packhorse.quantize.calibration.statistics import InputStatistics
from packhorse.quantize.methods import Method, int8
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import (
    QuantizationArgs,
    Scheme,
    round_activations,
    round_to_nearest,
    search_parameters,
)
from packhorse.quantize.plan.estimates import SENSITIVITY_TOKENS
from packhorse.quantize.plan.plan import Plan
from packhorse.quantize.quality.divergence import kl_divergence
from packhorse.quantize.settings import Progress

STATISTICS_TOKENS = 4 * SENSITIVITY_TOKENS
"""Tokens for the input statistics. They are other tokens than those of the divergence: on the
tokens that a method was calibrated with, its error looks smaller than it is."""

VARIANTS = ("usual", "w8a8")
"""A group is quantized by the plan's method and scheme, and to W8A8."""
Names = tuple[str, ...]


def measure_costs(
    source: Checkpoint,
    family: Family,
    planned: Plan,
    rows_RT: Tensor,
    device: torch.device,
    store: ActivationStore,
    progress: Progress,
) -> list[dict[str, Any]]:
    """For every fused group that is quantized: its `layers`; `cost` and `cost_w8a8`, the mean KL
    divergences in nats per token under the plan's scheme and under W8A8; and `errors`, the squared
    errors of its outputs under the plan's scheme and each of its choices. Plain data for JSON.
    """
    judged, others = split_rows(rows_RT)
    judge = Runner(source, family, judged, device, store)
    learner = Runner(source, family, others, device)
    method = methods.make(planned.method, planned.scheme)
    errors: dict[Names, list[float]] = {}
    advance = progress("measuring sensitivities", count_blocks(source, family))
    linears = set(planned.linears)
    for block in load_blocks(source, family):
        judged_block, learning_block = judge.enter(block), learner.enter(block)
        block.tensors.clear()
        source.close_files()
        for group in errors:
            for variant in VARIANTS:
                for number in range(judge.batches):
                    key: Key = (variant, *group, number)
                    with fast_matmul():
                        store.put(key, judged_block.through(store.get(key), number))
        groups = [group for stage in family.stages(judged_block.names) for group in stage]
        statistics = learning_block.statistics(groups)
        for names in groups:
            group = tuple(block.prefix + name for name in names)
            if group[0] in linears:
                of_group = statistics.pop(names[0])
                errors[group] = _quantize_group(
                    judged_block, names, group, of_group, method, planned
                )
        judge.leave(judged_block)
        learner.leave(learning_block)
        advance(1)
    costs = {(variant, group): 0.0 for variant in VARIANTS for group in errors}
    head = judge.head()
    with fast_matmul():
        for number in range(judge.batches):
            # The judge's own weights were restored after each group: these are the original's.
            original = head(judge.hidden("quantized", number))
            for variant, group in costs:
                quantized = head(store.get((variant, *group, number)))
                share = original.shape[0] / len(judged)  # all rows have the same length
                costs[variant, group] += mean_divergence(original, quantized) * share
    store.drop()
    return [
        {
            "layers": list(group),
            "cost": costs["usual", group],
            "cost_w8a8": costs["w8a8", group],
            "errors": found,
        }
        for group, found in errors.items()
    ]


def split_rows(rows_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Rows for the divergence, and other rows for the input statistics. A single row is used for
    both.
    """
    sequence_length = rows_RT.shape[1]
    judged = max(1, min(SENSITIVITY_TOKENS // sequence_length, len(rows_RT) // 5))
    count = max(1, STATISTICS_TOKENS // sequence_length)
    others = rows_RT[judged : judged + count]
    return rows_RT[:judged], others if len(others) else rows_RT


def mean_divergence(original_TV: Tensor, quantized_TV: Tensor) -> float:
    """KL(original || quantized) of logits: nats, mean over tokens."""
    total, count = 0.0, 0
    both = [torch.split(logits.flatten(0, -2), 256) for logits in (original_TV, quantized_TV)]
    for original, quantized in zip(*both, strict=True):
        p, q = original.float().log_softmax(dim=-1), quantized.float().log_softmax(dim=-1)
        total += kl_divergence(p, q).sum().item()
        count += len(p)
    return total / count


def _quantize_group(
    live: RunningBlock,
    names: Names,
    group: Names,
    statistics: InputStatistics,
    method: Method,
    planned: Plan,
) -> list[float]:
    """Store the block's outputs with this group quantized by the method, and with it in W8A8; then
    restore its weights. Returns the squared error of the group's outputs, for the plan's scheme and
    each of its choices.
    """
    weights = [live.weight(name).clone() for name in names]
    method_error = 0.0
    for name, weight_OI in zip(names, weights, strict=True):
        quantized_OI = method.quantize(weight_OI, statistics, torch.bfloat16).weight.dequantize()
        method_error += _error(weight_OI, quantized_OI, statistics.sample_TI)
        live.weight(name).copy_(quantized_OI)
    _store_outputs(live, ("usual", *group))
    with _as_w8a8(live, names, weights, statistics):
        _store_outputs(live, ("w8a8", *group))
    for name, weight_OI in zip(names, weights, strict=True):
        live.weight(name).copy_(weight_OI)
    plain = sum(_rounding_error(weight_OI, statistics, planned.scheme) for weight_OI in weights)
    errors = [method_error]
    for scheme in planned.choices:
        error = sum(_rounding_error(weight_OI, statistics, scheme) for weight_OI in weights)
        # The method's gain over rounding is about the same for all group sizes; at 8 bits it is 1.
        same_bits = scheme.weights.bits == planned.scheme.weights.bits
        gain = method_error / max(plain, 1e-30) if same_bits else 1.0
        errors.append(error * gain)
    return errors


def _store_outputs(live: RunningBlock, key: Key) -> None:
    for number in range(live.runner.batches):
        live.runner.store.put((*key, number), live.output(number))


@contextmanager
def _as_w8a8(
    live: RunningBlock, names: Names, weights: Sequence[Tensor], statistics: InputStatistics
) -> Iterator[None]:
    """Within, the group's weights and inputs are rounded to 8 bits, with the smoothing factors that
    the method int8 would apply.
    """
    args = QuantizationArgs(8)
    scales_I = int8.search_scales(weights, statistics, args)
    if scales_I is None:
        scales_I = torch.ones(weights[0].shape[1], device=weights[0].device)

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_activations(inputs[0] / scales_I), *inputs[1:])

    with ExitStack() as hooks:
        for name, weight_OI in zip(names, weights, strict=True):
            quantized = round_to_nearest(weight_OI * scales_I, args, scale_dtype=torch.float32)
            live.weight(name).copy_(quantized.dequantize())
            layer = live.module.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(rounded).remove)
        yield


def _rounding_error(weight_OI: Tensor, statistics: InputStatistics, scheme: Scheme) -> float:
    """The squared error of a layer's outputs when its weight is rounded to nearest."""
    importance_I = statistics.hessian_II.diagonal()
    parameters = search_parameters(
        weight_OI, scheme.weights, importance_I, scale_dtype=torch.bfloat16, num_candidates=8
    )
    return _error(weight_OI, parameters.round(weight_OI).dequantize(), statistics.sample_TI)


def _error(weight_OI: Tensor, quantized_OI: Tensor, x_TI: Tensor) -> float:
    """The squared error of a layer's outputs on these inputs, summed."""
    return (x_TI @ (quantized_OI - weight_OI).T).square().sum().item()
