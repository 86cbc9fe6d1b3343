"""Mixed precision: what rounding each fused group of layers alone costs the model, measured at its
output; and more bits where they buy most per byte.

The cost of a group is the KL divergence that its rounded weights cause, all else left as it is.
KL is quadratic in small changes, so that costs of groups add up. All changed models are carried
through the blocks together, so that each block is read once. Called by `run`.
"""

# Shapes: O = outputs, I = inputs, T = tokens, V = vocabulary.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from packhorse.quantize import methods
from packhorse.quantize.calibration.activation_store import Key, Shelf
from packhorse.quantize.calibration.block_loader import count_blocks, walk
from packhorse.quantize.calibration.hooks import fast_products
from packhorse.quantize.calibration.runner import LiveBlock, Runner
from packhorse.quantize.calibration.statistics import Inputs
from packhorse.quantize.formats import FORMATS
from packhorse.quantize.methods import Method, int8
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import (
    Grid,
    Scheme,
    round_activations,
    round_to_nearest,
    search_placement,
)
from packhorse.quantize.plan.estimates import JUDGED_TOKENS, layer_parts
from packhorse.quantize.plan.plan import Plan
from packhorse.quantize.quality import divergence as distance
from packhorse.quantize.report.report import Progress
from torch import Tensor, nn

SEEN_TOKENS = 4 * JUDGED_TOKENS
"""Others, for what layers are given: a method that is judged by the text that it has seen looks
better than it is."""

HOW = ("usual", "w8a8")
Names = tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """What a group may become: its bytes, and what it then costs, in nats a token. Without a scheme
    it stays as it is.
    """

    scheme: Scheme | None
    size: int
    cost: float


def spend_budget(
    source: Checkpoint, planned: Plan, costs: Sequence[dict[str, Any]]
) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan with its budget spent by what `measure_costs` found, and for the report what each
    group costs and got.
    """
    assert planned.budget is not None
    choices = {tuple(found["layers"]): _choices(source, planned, found) for found in costs}
    weights = sum(_numbers(source, group) for group in choices)
    chosen = spend(choices, int(planned.budget * weights / 8))
    told = [
        {
            "layers": list(group),
            "cost_kl": float(f"{choices[group][0].cost:.3e}"),
            "got": "unchanged" if choice.scheme is None else _in_words(choice.scheme),
        }
        for group, choice in chosen.items()
    ]
    schemes = {name: choice.scheme for group, choice in chosen.items() for name in group}
    kept = {name for name, scheme in schemes.items() if scheme is None}
    return replace(
        planned,
        others={n: one for n, one in schemes.items() if one not in (planned.scheme, None)},
        linears=tuple(name for name in planned.linears if name not in kept),
        ignored=tuple(sorted({*planned.ignored, *kept})),
    ), told


def spend(choices: Mapping[Names, Sequence[Choice]], budget_bytes: int) -> dict[Names, Choice]:
    """One choice for each group, of no more bytes together than the budget: beginning with the
    smallest, always the change that saves most per byte.
    """
    chosen = {group: min(options, key=_size) for group, options in choices.items()}
    left = budget_bytes - sum(choice.size for choice in chosen.values())
    while True:
        gains = [
            ((now.cost - option.cost) / (option.size - now.size), group, option)
            for group, now in chosen.items()
            for option in choices[group]
            if option.cost < now.cost and now.size < option.size <= now.size + left
        ]
        if not gains:
            return chosen
        _, group, option = max(gains, key=lambda gain: (gain[0], gain[1]))
        left -= option.size - chosen[group].size
        chosen[group] = option


def _size(choice: Choice) -> int:
    return choice.size


def measure_costs(
    source: Checkpoint,
    family: Family,
    planned: Plan,
    rows_RT: Tensor,
    device: torch.device,
    shelf: Shelf,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Of every fused group: its layers, the KL that the plan's scheme costs and that W8A8 does, and
    the square error of its outputs under that scheme and each of the plan's choices. Plain data, to
    be kept.
    """
    judged, seen = _split(rows_RT)
    judge = Runner(source, family, judged, device, shelf)
    learner = Runner(source, family, seen, device)
    method = methods.make(planned.method, planned.scheme)
    errors: dict[Names, list[float]] = {}
    advance = progress("measuring what layers are worth", count_blocks(source, family))
    linears = set(planned.linears)
    for block in walk(source, family):
        live, looking = judge.enter(block), learner.enter(block)
        block.tensors.clear()
        source.let_go()
        for group in errors:
            for how in HOW:
                for number in range(judge.batches):
                    key: Key = (how, *group, number)
                    with fast_products():
                        shelf.put(key, live.through(shelf.get(key), number))
        groups = [group for stage in family.stages(live.names) for group in stage]
        inputs = looking.inputs(groups)
        for names in groups:
            group = tuple(block.prefix + name for name in names)
            if group[0] in linears:
                given = inputs.pop(names[0])
                errors[group] = _change(live, names, group, given, method, planned)
        judge.leave(live)
        learner.leave(looking)
        advance(1)
    costs = {(how, group): 0.0 for how in HOW for group in errors}
    head = judge.head()
    with fast_products():
        for number in range(judge.batches):
            # Nothing was quantized on the way: these are the original's.
            wanted = head(judge.hidden("quantized", number))
            for how, group in costs:
                found = head(shelf.get((how, *group, number)))
                share = wanted.shape[0] / len(judged)  # of the rows, which are all as long
                costs[how, group] += divergence(wanted, found) * share
    shelf.drop()
    return [
        {
            "layers": list(group),
            "cost": costs["usual", group],
            "cost_w8a8": costs["w8a8", group],
            "errors": found,
        }
        for group, found in errors.items()
    ]


def _split(rows_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to judge by, and others to look at; the same one where there is but one."""
    row_tokens = rows_RT.shape[1]
    judged = max(1, min(JUDGED_TOKENS // row_tokens, len(rows_RT) // 5))
    seen = max(1, SEEN_TOKENS // row_tokens)
    others = rows_RT[judged : judged + seen]
    return rows_RT[:judged], others if len(others) else rows_RT


def _change(
    live: LiveBlock, names: Names, group: Names, given: Inputs, method: Method, planned: Plan
) -> list[float]:
    """Carry two models on in which only this group is rounded: by the method, and to W8A8. Returns
    the square error of the group's outputs, for the plan's scheme and each of its choices.
    """
    weights = [live.weight(name).clone() for name in names]
    usual = 0.0
    for name, weight_OI in zip(names, weights, strict=True):
        rounded_OI = method.quantize(weight_OI, given, torch.bfloat16).codes.dequantize()
        usual += _error(weight_OI, rounded_OI, given.sample_TI)
        live.weight(name).copy_(rounded_OI)
    _carry_on(live, ("usual", *group))
    with _rounding_inputs(live, names, weights, given):
        _carry_on(live, ("w8a8", *group))
    for name, weight_OI in zip(names, weights, strict=True):
        live.weight(name).copy_(weight_OI)
    plain = sum(_rounding_error(weight_OI, given, planned.scheme) for weight_OI in weights)
    found = [usual]
    for scheme in planned.choices:
        error = sum(_rounding_error(weight_OI, given, scheme) for weight_OI in weights)
        # The method does better than rounding, on any grid alike; 8 bits leave it nothing to gain.
        gain = usual / max(plain, 1e-30) if scheme.grid.bits == planned.scheme.grid.bits else 1.0
        found.append(error * gain)
    return found


def _carry_on(live: LiveBlock, key: Key) -> None:
    for number in range(live.runner.batches):
        live.runner.shelf.put((*key, number), live.output(number))


@contextmanager
def _rounding_inputs(
    live: LiveBlock, names: Names, weights: Sequence[Tensor], given: Inputs
) -> Iterator[None]:
    """The group as W8A8 has it, with the scales between inputs and weights that INT8 would move."""
    grid = Grid(8)
    scales_I = int8.search_scales(weights, given, grid)
    if scales_I is None:
        scales_I = torch.ones(weights[0].shape[1], device=weights[0].device)

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_activations(inputs[0] / scales_I), *inputs[1:])

    with ExitStack() as hooks:
        for name, weight_OI in zip(names, weights, strict=True):
            codes = round_to_nearest(weight_OI * scales_I, grid, scale_dtype=torch.float32)
            live.weight(name).copy_(codes.dequantize())
            layer = live.module.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(rounded).remove)
        yield


def _rounding_error(weight_OI: Tensor, given: Inputs, scheme: Scheme) -> float:
    """Where plain rounding is all."""
    importance_I = given.hessian_II.diagonal()
    placement = search_placement(
        weight_OI, scheme.grid, importance_I, scale_dtype=torch.bfloat16, num_candidates=8
    )
    return _error(weight_OI, placement.round(weight_OI).dequantize(), given.sample_TI)


def _error(weight_OI: Tensor, rounded_OI: Tensor, x_TI: Tensor) -> float:
    """Square, of a layer's outputs on these inputs."""
    return (x_TI @ (rounded_OI - weight_OI).T).square().sum().item()


def _choices(source: Checkpoint, planned: Plan, found: dict[str, Any]) -> list[Choice]:
    """W8A8 was measured; others are taken to cost as much less as the outputs' error is smaller."""
    made = []
    usual = max(found["errors"][0], 1e-30)
    for scheme, error in zip([planned.scheme, *planned.choices], found["errors"], strict=True):
        shapes = map(source.shape_of_weight, found["layers"])
        parts = [layer_parts(shape, scheme, FORMATS[0]) for shape in shapes]
        measured = scheme.activation_bits == 8
        cost = found["cost_w8a8"] if measured else found["cost"] * error / usual
        made.append(Choice(scheme, sum(map(sum, parts)), cost))
    made.append(Choice(None, 2 * _numbers(source, found["layers"]), 0.0))
    return made


def divergence(wanted_TV: Tensor, found_TV: Tensor) -> float:
    """KL of the found distribution from the wanted one, both as logits: nats, mean over tokens."""
    total, count = 0.0, 0
    both = [torch.split(logits.flatten(0, -2), 256) for logits in (wanted_TV, found_TV)]
    for wanted, found in zip(*both, strict=True):
        p, q = wanted.float().log_softmax(dim=-1), found.float().log_softmax(dim=-1)
        total += distance.divergence(p, q).sum().item()
        count += len(p)
    return total / count


def _numbers(source: Checkpoint, group: Sequence[str]) -> int:
    return sum(outputs * inputs for outputs, inputs in map(source.shape_of_weight, group))


def _in_words(scheme: Scheme) -> str:
    group = scheme.grid.group_size
    return f"{scheme}, groups of {group}" if group else str(scheme)
