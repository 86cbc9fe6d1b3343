"""Estimates from the shapes of a checkpoint: size of the result, memory, disk and time of the run,
and tensor parallel sizes.

Called by planner.py, and by run.py for disk space. Bytes of the result are exact within a per cent;
memory and time are estimates.
"""

# O = outputs, I = inputs of a linear layer; G = groups along I.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from packhorse.quantize.calibration.statistics import TOKENS_AT_ONCE
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.dtypes import FLOATS, bytes_of
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import Scheme

Shapes = Mapping[str, tuple[int, int]]
"""(O, I) of each quantized layer, by its prefix."""

BASE_BYTES = 400_000_000
"""Memory of Python, torch and transformers without a model."""
ROUNDING_FLOPS = 1700
"""Floating point operations of a matrix product that take as long as rounding one weight. Measured
on one thread of a Xeon with AMX: 48 million weights and 82 GFLOP per second."""
TRIAL_FLOPS = 140
"""The same for trying one more scale on one weight. Measured on one thread of an EPYC with AVX2:
370 million weights and 50 GFLOP per second."""
SENSITIVITY_TOKENS = 4096
"""Calibration tokens for measuring sensitivities; as many are enough to rank groups of layers."""
HEADER_BYTES = 80
"""Bytes of a tensor's entry in a safetensors header, without its name."""
DISK_MARGIN = 1.05
"""Factor on the planned size of the result, for the report and what the estimate leaves out."""
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
    """The size of the weight files. With `convert`, tensors that are not quantized are converted to
    a dtype of 2 bytes. `kv_scales` is the number of scales of the KV cache.
    """
    total = kv_scales * (4 + HEADER_BYTES + len("model.layers.00.self_attn.k_scale"))
    for name in source.names():
        if name.removesuffix(".weight") in layers:
            continue
        shape, dtype = source.shape_and_dtype(name)
        total += prod(shape) * (2 if convert and dtype in FLOATS else bytes_of(dtype))
        total += len(name) + HEADER_BYTES
    for prefix, sizes in layers.items():
        parts = layer_parts(sizes, scheme, layout)
        total += sum(parts) + len(parts) * (len(prefix) + len(".weight_scale") + HEADER_BYTES)
    return total


def layer_parts(shape: tuple[int, int], scheme: Scheme, layout: str) -> list[int]:
    """The bytes of each tensor of a quantized layer."""
    outputs, inputs = shape
    args = scheme.weights
    if scheme.activation_bits == 8:
        return [outputs * inputs, outputs * 4]
    groups = inputs // (args.group_size or inputs)
    codes, scales = outputs * inputs * args.bits // 8, outputs * groups * 2
    zeros = outputs * groups * args.bits // 8
    if layout == "gptq":
        return [codes, scales, zeros, inputs * 4]
    if layout == "awq":
        return [codes, scales, zeros]
    return [codes, scales, 16] if args.symmetric else [codes, scales, zeros, 16]


def block_of(name: str) -> str:
    """The decoder block of a tensor, such as `model.layers.3`; empty outside the blocks."""
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
    """The peak memory of quantizing in bytes, when no activations are offloaded. `tokens` is the
    number of calibration tokens, 0 without calibration; each has `hidden_size` numbers. With
    `mixed`, sensitivities are measured first.
    """
    numbers: dict[str, int] = {}
    stored: dict[str, int] = {}
    for name in source.names():
        shape, dtype = source.shape_and_dtype(name)
        block = block_of(name)
        numbers[block] = numbers.get(block, 0) + prod(shape)
        stored[block] = stored.get(block, 0) + prod(shape) * bytes_of(dtype)
    fixed = BASE_BYTES
    if not tokens:
        # A block as on disk, and some float32 copies of one layer.
        return fixed + max(stored.values()) + 16 * max(prod(shape) for shape in layers.values())
    numbers.pop("", None)
    stored.setdefault("", 0)
    widths = _group_inputs(layers, family)
    widest = max(widths)
    # The block; the widest group's Hessian and its factor; copies of the largest weight; a batch's
    # activations in the MLP.
    live = 4 * max(numbers.values()) + 2 * 4 * widest**2
    live += 4 * 4 * (max(prod(shape) for shape in layers.values()) + TOKENS_AT_ONCE * widest)
    kept = activation_bytes(layers, family, tokens=tokens, hidden_size=hidden_size)
    if mixed:  # two copies of the block, and the Hessians of all groups
        live += 4 * max(numbers.values()) + 4 * sum(width**2 for width in widths)
        kept = max(kept, sensitivity_bytes(layers, hidden_size=hidden_size))
    return fixed + stored[""] + live + kept


def sensitivity_bytes(layers: Shapes, *, hidden_size: int) -> int:
    """Bytes of the hidden states of all models with one quantized group, in two variants each. An
    upper bound, which counts layers as groups.
    """
    return 2 * len(layers) * 4 * SENSITIVITY_TOKENS * hidden_size


def activation_bytes(
    layers: Shapes, family: Family | None, *, tokens: int, hidden_size: int
) -> int:
    """Bytes of stored activations, in memory or in files: float32 hidden states of both models, and
    the recorded inputs of the original's layers and two norms in bfloat16.
    """
    recorded = sum(_group_inputs(layers, family)) + 2 * hidden_size
    return 2 * 4 * tokens * hidden_size + 2 * tokens * recorded


def disk_bytes(
    layers: Shapes,
    family: Family | None,
    *,
    result_bytes: int,
    side_bytes: int,
    shard_bytes: int,
    tokens: int,
    hidden_size: int,
    offload_limit_bytes: int,
    mixed: bool,
) -> int:
    """The most disk space that a run takes: the result, a second copy of one shard, the hidden
    states of both models before and behind a block, and offloaded activations. `tokens` is 0
    without calibration.
    """
    needed = round(DISK_MARGIN * (result_bytes + side_bytes)) + min(result_bytes, shard_bytes)
    if not tokens:
        return needed
    stored = activation_bytes(layers, family, tokens=tokens, hidden_size=hidden_size)
    if mixed:
        stored = max(stored, sensitivity_bytes(layers, hidden_size=hidden_size))
    return needed + 2 * 2 * 4 * tokens * hidden_size + max(0, stored - offload_limit_bytes)


def _group_inputs(layers: Shapes, family: Family | None) -> list[int]:
    """The number of inputs of each group of layers in the first block; of each layer, when the
    family is unknown.
    """
    first = min(layers, key=lambda prefix: (len(prefix), prefix))
    block = f"{block_of(first)}."
    members = {p.removeprefix(block): shape for p, shape in layers.items() if p.startswith(block)}
    if family is None:
        return [inputs for _, inputs in members.values()]
    named = {family.in_module(name): inputs for name, (_, inputs) in members.items()}
    # One expert stands for all, as statistics of experts are taken in parts.
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
    """The time to quantize: rounding, with `scales_tried` more scales per weight; with calibration
    tokens also their `forwards` passes, the Hessians and the column-by-column solver.
    """
    weights = sum(prod(shape) for shape in layers.values())
    work = float(weights) * (ROUNDING_FLOPS + TRIAL_FLOPS * scales_tried)
    if tokens:
        work += 2.0 * weights * tokens * forwards
        blocks = len({block_of(prefix) for prefix in layers})
        # Two statistics per group; two factorizations, of error compensation and of the solver; and
        # about five matrix products.
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
    """The tensor parallel sizes of 1, 2, 4 and 8 with which vLLM can load the layers. `fused` has
    the names of a block's layers, in the groups that vLLM fuses.
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
    """Whether the layers of one fused group split over `size` ranks in every block."""
    weight_only = scheme.activation_bits == 16
    multiple = 32 if weight_only else 16
    group_size = scheme.weights.group_size or 1
    for block in {block_of(prefix) for prefix in layers}:
        outputs = 0
        for name in group:
            if f"{block}.{name}" not in layers:
                continue  # not quantized, so no group of weights is in the way
            all_outputs, inputs = layers[f"{block}.{name}"]
            leaf = name.rpartition(".")[2]
            if leaf in _ROW_PARALLEL:
                if inputs % size or inputs // size % multiple or inputs // size % group_size:
                    return False
                outputs += all_outputs
            elif leaf in ("k_proj", "v_proj"):
                outputs += kv_outputs  # with more ranks than heads, ranks share a head
            elif all_outputs % size or (weight_only and all_outputs // size % 8):
                return False
            else:
                outputs += all_outputs // size
        if outputs % multiple:
            return False
    return True
