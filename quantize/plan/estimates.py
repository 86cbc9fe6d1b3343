"""How large a quantized checkpoint gets, what making it takes, and over how many ranks it splits:
arithmetic on shapes.

Called by `planner`, and by `run` for room on disk. Bytes on disk are exact but for the last per
cent; memory and time are estimates.
"""

# O = outputs, I = inputs of a linear layer; G = groups along I.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from packhorse.quantize.calibration.statistics import TOKENS_AT_ONCE
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import Scheme

Shapes = Mapping[str, tuple[int, int]]
"""(O, I) of each quantized layer, by prefix."""

BASE_BYTES = 400_000_000
"""Python, torch and transformers, before any model."""
ROUNDING_FLOPS = 1700
"""Rounding a weight takes as long as this many operations of a matrix product: 48 million weights a
second beside 82 GFLOP/s, on one thread of a Xeon with AMX."""
TRIAL_FLOPS = 140
"""The same for trying one more scale on a weight: 370 million a second beside 50 GFLOP/s, on one
thread of an EPYC with AVX2."""
JUDGED_TOKENS = 4096
"""Of the calibration text, for what layers are worth: so many are enough to rank groups."""
HEADER_BYTES = 80
"""Of a tensor's entry in a safetensors header, but for its name."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_ROW_PARALLEL = ("o_proj", "down_proj", "w2", "out_proj", "fc2", "dense_4h_to_h")
"""Layers that vLLM splits along their inputs; the others along their outputs."""


def bytes_after(
    source: Checkpoint,
    layers: Shapes,
    scheme: Scheme,
    *,
    layout: str,
    convert: bool,
    kv_scales: int = 0,
) -> int:
    """Size of the weight files. `convert`: tensors that are not quantized become 2 bytes a number.
    `kv_scales` counts those of the KV cache.
    """
    total = kv_scales * (4 + HEADER_BYTES + len("model.layers.00.self_attn.k_scale"))
    for name in source.names():
        if name.removesuffix(".weight") in layers:
            continue
        shape, dtype = source.shape_and_dtype(name)
        total += prod(shape) * (2 if convert and dtype in FLOATS else _bytes_of(dtype))
        total += len(name) + HEADER_BYTES
    for prefix, sizes in layers.items():
        parts = layer_parts(sizes, scheme, layout)
        total += sum(parts) + len(parts) * (len(prefix) + len(".weight_scale") + HEADER_BYTES)
    return total


def layer_parts(shape: tuple[int, int], scheme: Scheme, layout: str) -> list[int]:
    """Bytes of each tensor that a layer becomes."""
    outputs, inputs = shape
    grid = scheme.grid
    if scheme.activation_bits == 8:
        return [outputs * inputs, outputs * 4]
    groups = inputs // (grid.group_size or inputs)
    codes, scales = outputs * inputs * grid.bits // 8, outputs * groups * 2
    zeros = outputs * groups * grid.bits // 8
    if layout == "gptq":
        return [codes, scales, zeros, inputs * 4]
    if layout == "awq":
        return [codes, scales, zeros]
    return [codes, scales, 16] if grid.symmetric else [codes, scales, zeros, 16]


def _bytes_of(dtype: str) -> int:
    """F32 4, BF16 2, F8_E4M3 1, BOOL 1, ..."""
    digits = "".join(filter(str.isdigit, dtype.split("_")[0]))
    return int(digits) // 8 if digits else 1


def block_of(name: str) -> str:
    """The decoder block that a tensor belongs to: `model.layers.3`; empty outside the blocks."""
    parts = name.split(".")
    ends = [end for end, part in enumerate(parts) if part.isdigit() and end > 0]
    return ".".join(parts[: ends[0] + 1]) if ends else ""


def peak_memory(
    source: Checkpoint,
    layers: Shapes,
    family: Family | None,
    *,
    tokens: int,
    hidden_size: int,
    mixed: bool = False,
) -> int:
    """Bytes at the worst moment of quantizing, if nothing waits on disk. `tokens` of calibration
    text, 0 without, each with `hidden_size` numbers. `mixed`: what layers are worth is measured
    first.
    """
    numbers: dict[str, int] = {}
    stored: dict[str, int] = {}
    for name in source.names():
        shape, dtype = source.shape_and_dtype(name)
        block = block_of(name)
        numbers[block] = numbers.get(block, 0) + prod(shape)
        stored[block] = stored.get(block, 0) + prod(shape) * _bytes_of(dtype)
    fixed = BASE_BYTES
    if not tokens:
        # Some float32 copies of one layer, while its block waits.
        return fixed + max(stored.values()) + 16 * max(prod(shape) for shape in layers.values())
    numbers.pop("", None)
    stored.setdefault("", 0)
    widths = _group_inputs(layers, family)
    widest = max(widths)
    # The block; the widest group's Hessian and its factor; copies of the largest weight; what a
    # batch makes in the MLP.
    live = 4 * max(numbers.values()) + 2 * 4 * widest**2
    live += 4 * 4 * (max(prod(shape) for shape in layers.values()) + TOKENS_AT_ONCE * widest)
    kept = waiting(layers, family, tokens=tokens, hidden_size=hidden_size)
    if mixed:  # two blocks, and the Hessians of all groups
        live += 4 * max(numbers.values()) + 4 * sum(width**2 for width in widths)
        kept = max(kept, changed(layers, hidden_size=hidden_size))
    return fixed + stored[""] + live + kept


def changed(layers: Shapes, *, hidden_size: int) -> int:
    """Bytes of the hidden states of all models in which one group is changed, in one of two ways;
    at most, as layers are counted for groups.
    """
    return 2 * len(layers) * 4 * JUDGED_TOKENS * hidden_size


def waiting(layers: Shapes, family: Family | None, *, tokens: int, hidden_size: int) -> int:
    """Bytes, in memory or in files: every token's hidden state in both models; what the original's
    layers are given, with both norms, in bfloat16.
    """
    given = sum(_group_inputs(layers, family)) + 2 * hidden_size
    return 2 * 4 * tokens * hidden_size + 2 * tokens * given


def _group_inputs(layers: Shapes, family: Family | None) -> list[int]:
    """Inputs of each group of layers in the first block; of each layer, where no group is known."""
    first = min(layers, key=lambda prefix: (len(prefix), prefix))
    block = f"{block_of(first)}."
    members = {p.removeprefix(block): shape for p, shape in layers.items() if p.startswith(block)}
    if family is None:
        return [inputs for _, inputs in members.values()]
    named = {family.in_module(name): inputs for name, (_, inputs) in members.items()}
    # Of experts one at a time: their statistics are taken in parts.
    stages = family.stages({f"{name}.weight" for name in named})
    return [named[stage[0][0]] for stage in stages]


def seconds(
    layers: Shapes,
    family: Family | None,
    *,
    tokens: int,
    scales_tried: int,
    forwards: int,
    flops_per_s: float,
) -> float:
    """Time to quantize: rounding, with `scales_tried` more scales a weight, and where there are
    calibration tokens `forwards` runs of them, Hessians and the column by column solver.
    """
    weights = sum(prod(shape) for shape in layers.values())
    work = float(weights) * (ROUNDING_FLOPS + TRIAL_FLOPS * scales_tried)
    if tokens:
        work += 2.0 * weights * tokens * forwards
        blocks = len({block_of(prefix) for prefix in layers})
        # Two statistics a group; the correction's and the solver's factor, and about five products.
        widths = _group_inputs(layers, family)
        work += blocks * sum(4.0 * tokens * width**2 + 0.7 * width**3 for width in widths)
        work += sum(9.0 * outputs * inputs**2 for outputs, inputs in layers.values())
    return work / flops_per_s


def tensor_parallel(
    layers: Shapes,
    scheme: Scheme,
    fused: Sequence[Sequence[str]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> tuple[int, ...]:
    """The sizes of 1, 2, 4 and 8 that vLLM can split the layers over. `fused` names the layers of a
    block, those in one kernel together.
    """
    return tuple(
        size
        for size in (1, 2, 4, 8)
        if size == 1
        or (
            heads % size == 0
            and (kv_heads % size == 0 or size % kv_heads == 0)
            and all(
                _splits(layers, scheme, group, size, kv_outputs=max(1, kv_heads // size) * head_dim)
                for group in fused
            )
        )
    )


def _splits(
    layers: Shapes, scheme: Scheme, group: Sequence[str], size: int, *, kv_outputs: int
) -> bool:
    """Whether one kernel's layers split over `size` ranks in every block."""
    weight_only = scheme.activation_bits == 16
    multiple = 32 if weight_only else 16
    group_size = scheme.grid.group_size or 1
    for block in {block_of(prefix) for prefix in layers}:
        outputs = 0
        for name in group:
            if f"{block}.{name}" not in layers:
                continue  # kept as it is: only groups of weights are in the way
            all_outputs, inputs = layers[f"{block}.{name}"]
            leaf = name.rpartition(".")[2]
            if leaf in _ROW_PARALLEL:
                if inputs % size or inputs // size % multiple or inputs // size % group_size:
                    return False
                outputs += all_outputs
            elif leaf in ("k_proj", "v_proj"):
                outputs += kv_outputs  # a head that is fewer than the ranks is copied to several
            elif all_outputs % size or (weight_only and all_outputs // size % 8):
                return False
            else:
                outputs += all_outputs // size
        if outputs % multiple:
            return False
    return True
