"""Mixed precision: choose a scheme for each fused group of layers within a budget of bits.

The costs of the groups come from quality/sensitivity.py. They are KL divergences, which are
quadratic in small changes of the weights, so that the costs of several groups add up. Called by
run.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from packhorse.quantize.formats import FORMATS
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.numerics.grid import Scheme
from packhorse.quantize.plan.estimates import layer_parts
from packhorse.quantize.plan.plan import Plan

Names = tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """A scheme that a group may get, its bytes on disk, and its cost in nats per token. Without a
    scheme the group stays unquantized.
    """

    scheme: Scheme | None
    size: int
    cost: float


def spend_budget(
    source: Checkpoint, planned: Plan, costs: Sequence[dict[str, Any]]
) -> tuple[Plan, list[dict[str, Any]]]:
    """Allocate the plan's budget by the costs that `sensitivity.measure_costs` returned.

    Returns the plan with the schemes of all layers, and for the report each group's layers, cost
    and scheme.
    """
    assert planned.budget is not None
    choices = {tuple(group["layers"]): _choices(source, planned, group) for group in costs}
    weights = sum(_count_weights(source, group) for group in choices)
    chosen = spend(choices, int(planned.budget * weights / 8))
    precision = [
        {
            "layers": list(group),
            "cost_kl": float(f"{choices[group][0].cost:.3e}"),
            "got": "unchanged" if choice.scheme is None else _describe(choice.scheme),
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
    ), precision


def spend(choices: Mapping[Names, Sequence[Choice]], budget_bytes: int) -> dict[Names, Choice]:
    """One choice for each group, together within the budget. Greedy: begins with each group's
    smallest choice, and makes the change that lowers the cost most per byte until none fits.
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


def _choices(source: Checkpoint, planned: Plan, costs: dict[str, Any]) -> list[Choice]:
    """The choices of one group. The cost of W8A8 was measured; that of any other scheme is the
    measured cost of the plan's scheme, scaled by the ratio of their output errors.
    """
    choices = []
    base_error = max(costs["errors"][0], 1e-30)
    for scheme, error in zip([planned.scheme, *planned.choices], costs["errors"], strict=True):
        shapes = map(source.shape_of_weight, costs["layers"])
        parts = [layer_parts(shape, scheme, FORMATS[0]) for shape in shapes]
        measured = scheme.activation_bits == 8
        cost = costs["cost_w8a8"] if measured else costs["cost"] * error / base_error
        choices.append(Choice(scheme, sum(map(sum, parts)), cost))
    choices.append(Choice(None, 2 * _count_weights(source, costs["layers"]), 0.0))
    return choices


def _count_weights(source: Checkpoint, group: Sequence[str]) -> int:
    return sum(outputs * inputs for outputs, inputs in map(source.shape_of_weight, group))


def _describe(scheme: Scheme) -> str:
    group = scheme.weights.group_size
    return f"{scheme}, groups of {group}" if group else str(scheme)
