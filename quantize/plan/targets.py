"""The linear layers of a checkpoint that are quantized, by tensor names and headers.

For known families the roles of layers come from model/families.py; in other models, every plain
linear layer of a decoder block is quantized. Called by planner.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate
from math import prod

from packhorse.quantize.errors import BadInput, Unsupported
from packhorse.quantize.formats import FORMATS
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import Family
from packhorse.quantize.numerics.grid import Scheme
from packhorse.quantize.plan.estimates import Shapes, block_of
from packhorse.quantize.settings import Settings

MULTIPLE = 32
"""vLLM's kernels need both sizes of a layer to be multiples of this."""
EXPERT_GROUPS = (64, 128)
"""The group sizes of vLLM's CPU kernel for experts."""
_IN_BLOCK = re.compile(r"^(?!.*(vision|visual|audio)).*?(^|\.)(layers|h)\.\d+\.")
_EMBEDDING = re.compile(r"embed|(^|\.)wte$|(^|\.)wpe$")
_NOT_LINEAR = re.compile(r"embed|norm|head\.weight$|\.(gate|router|shared_expert_gate)\.weight$")
"""Not quantized in the blocks of unknown models. vLLM never quantizes routers."""
_TRANSPOSED = ("gpt2", "openai-gpt")


def of_family(source: Checkpoint, family: Family) -> Shapes:
    """The layers of a known family. Raises BadInput when a block or a tensor is missing,
    Unsupported for a tensor of unknown role.
    """
    blocks: dict[str, list[str]] = {}
    for name in source.names():
        if name.startswith(family.block_prefix):
            blocks.setdefault(name.removeprefix(family.block_prefix).split(".")[0], []).append(name)
    expected = source.number("num_hidden_layers")
    if blocks.keys() != {str(index) for index in range(expected)} or not expected:
        raise BadInput(
            f"{source.folder}: config.json speaks of {expected} blocks, the weights hold "
            f"{len(blocks)}; the checkpoint is incomplete."
        )
    layers = {}
    for index in range(expected):
        prefix = f"{family.block_prefix}{index}."
        inner = {family.in_module(name.removeprefix(prefix)) for name in blocks[str(index)]}
        stages = family.stages(inner)
        linears = [layer for stage in stages for group in stage for layer in group]
        _check_whole(source, family, prefix, linears)
        for linear in linears:
            name = f"{prefix}{family.on_disk(linear)}.weight"
            if name not in source:
                raise BadInput(f"{source.folder} has no tensor {name}; it is incomplete.")
            shape, _ = source.shape_and_dtype(name)
            if len(shape) != 2:
                raise BadInput(f"{name} has {len(shape)} dimensions, not 2; the file is broken.")
            layers[name.removesuffix(".weight")] = (shape[0], shape[1])
        routers = {prefix + family.on_disk(family.router)} if family.router else set()
        for name in blocks[str(index)]:
            shape, _ = source.shape_and_dtype(name)
            if len(shape) > 1 and name.removesuffix(".weight") not in layers.keys() | routers:
                raise Unsupported(
                    f"{name} is a weight that this version does not know how to treat."
                )
    return layers


def _check_whole(source: Checkpoint, family: Family, prefix: str, linears: Sequence[str]) -> None:
    """Raises BadInput when a group of the family is missing in a block. A block with experts needs
    as many as the config says, and no MLP.
    """
    experts = sum(family.is_expert(name) and name.endswith(".gate_proj") for name in linears)
    expected = source.number("num_local_experts") or source.number("num_experts")
    if experts and experts != expected:
        raise BadInput(
            f"{source.folder}: config.json speaks of {expected} experts, {prefix[:-1]} has "
            f"{experts}; the checkpoint is incomplete."
        )
    for group in family.fused:
        if group[0] not in linears and not (experts and group[0].startswith("mlp.")):
            name = f"{prefix}{family.on_disk(group[0])}.weight"
            raise BadInput(f"{source.folder} has no tensor {name}; it is incomplete.")


def of_unknown(source: Checkpoint) -> Shapes:
    """The linear layers in the blocks of an unknown model, for rounding to nearest. Raises
    Unsupported when they are not most of the model.
    """
    model_type = source.config.get("model_type")
    if model_type in _TRANSPOSED:
        raise Unsupported(f"model_type {model_type!r} keeps its weights transposed; not supported.")
    layers, left_out = {}, {}
    for name in source.names():
        shape, _ = source.shape_and_dtype(name)
        if not _IN_BLOCK.search(name) or len(shape) < 2:
            continue
        if len(shape) == 2 and name.endswith(".weight") and not _NOT_LINEAR.search(name):
            layers[name.removesuffix(".weight")] = (shape[0], shape[1])
        else:
            left_out[name] = prod(shape)
    if sum(left_out.values()) >= sum(map(prod, layers.values())):
        largest = f", such as {max(left_out, key=lambda name: left_out[name])}" if left_out else ""
        raise Unsupported(
            f"model_type {model_type!r} is not known, and most of its weights are not plain linear "
            f"layers in blocks{largest}; this version cannot quantize it."
        )
    return layers


def without_kept(
    layers: Shapes, patterns: Sequence[str], family: Family | None, notes: list[str]
) -> Shapes:
    """The layers that match no pattern of --keep. Layers that vLLM fuses with a kept layer are kept
    too, with a note. Raises BadInput for a pattern that matches no layer, or when all layers are
    kept.
    """
    kept: set[str] = set()
    for pattern in patterns:
        is_regex = pattern.startswith("re:")
        try:
            match = re.compile(pattern.removeprefix("re:") if is_regex else translate(pattern))
        except re.error as error:
            raise BadInput(f"--keep {pattern} is no regular expression: {error}.") from error
        named = {prefix for prefix in layers if match.match(prefix)}
        if not named:
            raise BadInput(
                f"--keep {pattern}: no layer is called like that; layers are called like "
                f"{next(iter(layers))}."
            )
        kept |= named
    for prefix in sorted(kept):
        more = {name for name in fused_with(prefix, layers, family) if name in layers} - kept
        if more:
            kept |= more
            notes.append(f"kept too, as vLLM fuses it with {prefix}: {', '.join(sorted(more))}")
    if kept == set(layers):
        raise BadInput("--keep keeps every layer, so nothing is left to quantize; name fewer.")
    return {prefix: shape for prefix, shape in layers.items() if prefix not in kept}


def inner_names(layers: Shapes, family: Family) -> set[str]:
    """The layers' names within their blocks, as in the module."""
    return {family.in_module(prefix.removeprefix(f"{block_of(prefix)}.")) for prefix in layers}


def in_block(layers: Shapes, block: str, family: Family) -> set[str]:
    """The weights of one block's layers, by their names in the module."""
    inside = {prefix: shape for prefix, shape in layers.items() if block_of(prefix) == block}
    return {f"{name}.weight" for name in inner_names(inside, family)}


def fused_with(prefix: str, layers: Shapes, family: Family | None) -> tuple[str, ...]:
    """The layers that vLLM computes in one kernel with this one, including itself: a fused group,
    or all experts of a block.
    """
    if family is None:
        return (prefix,)
    block = f"{block_of(prefix)}."
    inner = family.in_module(prefix.removeprefix(block))
    if family.is_expert(inner):
        start = block + family.on_disk(f"{family.experts}.")
        return tuple(name for name in layers if name.startswith(start))
    group = next(group for group in family.fused if inner in group)
    return tuple(block + family.on_disk(name) for name in group)


def check_sizes(layers: Shapes) -> None:
    """Raises Unsupported for a layer whose sizes vLLM's kernels do not support."""
    for prefix, (outputs, inputs) in layers.items():
        if outputs % MULTIPLE or inputs % MULTIPLE:
            raise Unsupported(
                f"{prefix} is {outputs} x {inputs}; vLLM's kernels need multiples of {MULTIPLE}."
            )


def check_experts(settings: Settings, scheme: Scheme, layout: str) -> None:
    """Raises Unsupported for schemes and formats without a kernel for experts in vLLM."""
    args = scheme.weights
    if layout != FORMATS[0]:
        raise Unsupported(f"--format {layout} with experts was never tried; use {FORMATS[0]}.")
    if "cpu" not in settings.targets:
        return
    if args.floating:
        raise Unsupported(
            "fp8 with experts: vLLM has no CPU kernel for it; use --method int8, or --target cuda "
            "alone."
        )
    if scheme.activation_bits == 16 and not args.symmetric:
        raise Unsupported(
            f"asymmetric {settings.method} with experts: vLLM's CPU kernel for experts takes "
            "symmetric only; pass --symmetric, or use --target cuda alone."
        )
    if scheme.activation_bits == 16 and args.group_size not in EXPERT_GROUPS:
        groups = f"in groups of {args.group_size}" if args.group_size else "with a scale per output"
        raise Unsupported(
            f"experts {groups}: vLLM's CPU kernel for experts takes groups of 64 or 128 only; name "
            "one, use --method int8, or --target cuda alone."
        )


def left_alone(source: Checkpoint, layers: Shapes) -> tuple[str, ...]:
    """The linear layers that are not quantized: lm_head (tied or not), those outside the blocks,
    and those that --keep names.
    """
    left = {"lm_head"}
    for name in source.names():
        prefix = name.removesuffix(".weight")
        if prefix != name and prefix not in layers and not _EMBEDDING.search(prefix):
            shape, _ = source.shape_and_dtype(name)
            if len(shape) == 2:
                left.add(prefix)
                # vLLM 0.32 looks up the fused name in the dense blocks of Qwen3 MoE.
                if prefix.endswith(".mlp.gate_proj"):
                    left.add(f"{prefix.removesuffix('gate_proj')}gate_up_proj")
    return tuple(sorted(left))
