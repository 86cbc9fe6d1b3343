"""Plan a run before any work, from config.json and tensor headers: refuse what cannot be done or
served, choose what the settings leave open, and estimate size, memory and time.

Called by run.py before everything else, and by `quantize model --plan`. Reads no weights. The
kernels named here are those that vLLM 0.32 chooses; quality/engine_check.py asks the real engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from math import prod

from packhorse.quantize.errors import BadInput, Unsupported
from packhorse.quantize.formats import FORMATS
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.dtypes import OF_TORCH
from packhorse.quantize.model.families import FAMILIES, Family
from packhorse.quantize.numerics.grid import QuantizationArgs, Scheme
from packhorse.quantize.plan import estimates, targets
from packhorse.quantize.plan.host import Host, kernel, not_checkable_here, serving_notes, this_host
from packhorse.quantize.plan.plan import Plan
from packhorse.quantize.settings import CHANNEL, Settings

GROUP_SIZES = (128, 64, 32)
BASE_BITS, MOST_BITS = 4, 16
TARGETS = ("cpu", "cuda")
SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class Rule:
    """The options of a method; the first of `bits` and of `symmetric` is the default."""

    bits: tuple[int, ...]
    symmetric: tuple[bool, ...]
    activation_bits: int = 16
    floating: bool = False
    calibrated: bool = False
    needs_text: bool = False
    """Whether the method cannot do without calibration text."""
    scales_tried: int = 0
    """Candidate scales per weight, besides that of the whole range; for the time estimate."""
    forwards: int = 0
    """Passes of all calibration tokens through a block; for the time estimate."""


RULES = {
    "gptq": Rule(
        (4, 8), (True, False), calibrated=True, needs_text=True, scales_tried=48, forwards=3
    ),
    "awq": Rule(
        (4,), (False, True), calibrated=True, needs_text=True, scales_tried=24, forwards=23
    ),
    "int8": Rule((8,), (True,), activation_bits=8, calibrated=True, forwards=5),
    "fp8": Rule((8,), (True,), activation_bits=8, floating=True),
    "rtn": Rule((4, 8), (True, False)),
}


def plan(
    settings: Settings, source: Checkpoint, family: Family | None, *, host: Host | None = None
) -> Plan:
    """Plan a run. `family` is None for an unknown model_type; `host` None means this machine.

    Raises BadInput for an option or a checkpoint that cannot be used, Unsupported for a result that
    vLLM would not load. The message has the value, the limit and a way to fix it.
    """
    _refuse_quantized(source)
    budget, settings = _budget(settings)
    rule, args, layout = _choose(settings)
    weight_only = rule.activation_bits == 16
    _check_targets(settings, args, weight_only=weight_only)
    kv = _check_kv(settings, source, layout)
    if family is None:
        _check_unknown(settings, source)
    layers = targets.of_family(source, family) if family else targets.of_unknown(source)
    notes: list[str] = []
    layers = targets.without_kept(layers, settings.keep, family, notes)
    targets.check_sizes(layers)
    host = host or this_host()
    group_size = _fit_groups(layers, settings.group_size, notes) if weight_only else CHANNEL
    groups = None if group_size == CHANNEL else group_size
    scheme = Scheme(
        QuantizationArgs(args.bits, groups, args.symmetric, args.floating), rule.activation_bits
    )
    stored, dtype = _dtypes(source)
    if budget and family and family.experts:
        raise Unsupported(
            f"--bits {budget}: experts cannot be mixed, as vLLM wants all of a block alike; give "
            "whole bits."
        )
    choices = _choices(settings, scheme, layers) if budget else ()
    rounds_inputs = any(one.activation_bits == 8 for one in (scheme, *choices))
    convert_to = "bfloat16" if rounds_inputs and (stored, dtype) != ("BF16", "BF16") else None
    if convert_to:
        other = stored if stored != "BF16" else dtype
        notes.append(f"converted from {other} to bfloat16: W8A8 kernels need it")
    if family is None:
        notes.append(
            f"model_type {source.config.get('model_type')!r} is not known: every linear layer of a "
            "block is rounded by itself, and tensor parallel sizes are not worked out"
        )
    experts = family is not None and any(map(family.is_expert, targets.inner_names(layers, family)))
    if experts:
        targets.check_experts(settings, scheme, layout)
    notes += serving_notes(settings.targets, scheme, host, kv=kv, experts=experts)
    if _is_tied(source):
        notes.append("lm_head shares the embeddings' weights and stays as it is")
    calibrated = rule.calibrated or kv
    sequence_length = _sequence_length(settings, source) if calibrated else 0
    tokens = settings.calibration_tokens if calibrated else 0
    blocks = len({estimates.block_of(prefix) for prefix in layers})
    bytes_after = estimates.bytes_after(
        source,
        layers,
        scheme,
        layout=layout,
        convert=convert_to is not None,
        kv_scales=2 * blocks if kv else 0,
    )
    if budget:
        bytes_after += _over_budget(budget, layers, scheme)
    return Plan(
        method=settings.method,
        scheme=scheme,
        format=layout,
        group_size=group_size,
        kv=kv,
        calibrated=calibrated,
        needs_text=rule.needs_text or kv or budget is not None,
        sequence_length=sequence_length,
        convert_to=convert_to,
        linears=tuple(layers),
        ignored=targets.left_alone(source, layers),
        budget=budget,
        choices=choices,
        bytes_before=source.weight_bytes(),
        bytes_after=bytes_after,
        peak_memory_bytes=estimates.peak_memory(
            source,
            layers,
            family,
            tokens=tokens,
            hidden_size=source.number("hidden_size"),
            mixed=budget is not None,
        ),
        seconds=estimates.seconds(
            layers,
            family,
            tokens=tokens,
            scales_tried=rule.scales_tried,
            forwards=max(rule.forwards, 2 if kv else 0),
            flops_per_s=host.flops_per_s,
        ),
        flops_per_s=host.flops_per_s,
        tensor_parallel=_tensor_parallel(source, layers, scheme, family) if family else (1,),
        kernels={target: kernel(target, scheme, dtype, host) for target in settings.targets},
        not_checkable_here=not_checkable_here(scheme, host, kv=kv, experts=experts),
        notes=notes,
    )


def _refuse_quantized(source: Checkpoint) -> None:
    for part in (source.config, source.config.get("text_config") or {}):
        if earlier := part.get("quantization_config"):
            raise Unsupported(
                f"{source.folder} is quantized already ({earlier.get('quant_method')}); "
                "start from the original checkpoint."
            )


def _budget(settings: Settings) -> tuple[float | None, Settings]:
    """The budget for mixed precision if --bits is not a whole number, and settings with the bits of
    most weights.
    """
    bits = settings.bits
    if bits is None or (math.isfinite(bits) and bits == int(bits)):
        return None, settings
    if settings.method not in ("gptq", "awq") or settings.format not in (None, FORMATS[0]):
        raise Unsupported(
            f"--bits {bits} mixes kinds of layers, which needs --method gptq or awq and the format "
            f"{FORMATS[0]}; give whole bits otherwise."
        )
    if not BASE_BITS < bits < MOST_BITS:
        raise BadInput(
            f"--bits {bits}: on average a weight may have more than {BASE_BITS} and less than "
            f"{MOST_BITS}."
        )
    return bits, replace(settings, bits=BASE_BITS)


def _choices(settings: Settings, scheme: Scheme, layers: estimates.Shapes) -> tuple[Scheme, ...]:
    """The other schemes, coarser and finer, that vLLM can run on all targets."""
    args = scheme.weights
    choices = [Scheme(replace(args, group_size=size)) for size in (None, *_fitting(layers))]
    choices.append(Scheme(QuantizationArgs(8), 8))
    if "cpu" not in settings.targets:
        choices.append(Scheme(QuantizationArgs(8, args.group_size)))
    return tuple(one for one in choices if one != scheme)


def _over_budget(budget: float, layers: estimates.Shapes, scheme: Scheme) -> int:
    """The bytes of the budget beyond those of the plan's scheme. Raises BadInput when the scheme
    itself takes more than the budget.
    """
    weights = sum(map(prod, layers.values()))
    usual = 8 * sum(
        sum(estimates.layer_parts(shape, scheme, FORMATS[0])) for shape in layers.values()
    )
    if budget * weights < usual:
        raise BadInput(
            f"--bits {budget}: with their scales, {scheme} weights take {usual / weights:.3f} bits "
            "already; give more, or larger groups."
        )
    return round((budget * weights - usual) / 8)


def _choose(settings: Settings) -> tuple[Rule, QuantizationArgs, str]:
    """The method's rule, the quantization args without a group size, and the format's name."""
    method, layout = settings.method, settings.format or FORMATS[0]
    for option, value, known in (("method", method, tuple(RULES)), ("format", layout, FORMATS)):
        if value not in known:
            raise BadInput(f"--{option} {value} is not known; choose one of {', '.join(known)}.")
    rule = RULES[method]
    bits = rule.bits[0] if settings.bits is None else int(settings.bits)
    symmetric = rule.symmetric[0] if settings.symmetric is None else settings.symmetric
    if bits not in rule.bits:
        known_bits = " or ".join(map(str, rule.bits))
        raise BadInput(f"--bits {bits}: {method} takes {known_bits}; leave it out or change it.")
    if symmetric not in rule.symmetric:
        raise BadInput(f"--asymmetric: {method} is always symmetric; leave it out.")
    if bits == 8 and not symmetric:
        raise Unsupported("--bits 8 --asymmetric: vLLM has no kernel for it; drop one of the two.")
    if rule.activation_bits == 8:
        if settings.group_size is not None:
            raise BadInput(f"--group-size: {method} has one scale per output; leave it out.")
        if layout != FORMATS[0]:
            raise Unsupported(f"--format {layout} cannot hold {method}: use --format {FORMATS[0]}.")
    if settings.group_size not in (None, CHANNEL, *GROUP_SIZES):
        raise BadInput(
            f"--group-size {settings.group_size}: vLLM loads groups of 32, 64 or 128, or -1 "
            "(one scale per output)."
        )
    if layout == "gptq" and not symmetric:
        raise Unsupported(
            f"--format gptq with asymmetric {method}: vLLM's GPTQ loader takes symmetric only: "
            f"use --format {FORMATS[0]}, or ask for --symmetric."
        )
    if layout == "awq" and (bits != 4 or symmetric):
        sign = "symmetric" if symmetric else "asymmetric"
        raise Unsupported(
            f"--format awq with {bits} bits {sign}: vLLM's AWQ loader takes 4 bits asymmetric "
            f"only: use --format {FORMATS[0]}, or ask for --bits 4 --asymmetric."
        )
    if layout == "awq" and settings.group_size == CHANNEL:
        raise Unsupported(
            "--format awq with --group-size -1: vLLM gives layers that are split along their "
            f"inputs no scales then: name 32, 64 or 128, or use --format {FORMATS[0]}."
        )
    return rule, QuantizationArgs(bits, None, symmetric, rule.floating), layout


def _sequence_length(settings: Settings, source: Checkpoint) -> int:
    """Tokens per calibration row: as set, or 512, or the model's shorter context length."""
    longest = source.number("max_position_embeddings") or SEQUENCE_LENGTH
    wanted = (
        min(SEQUENCE_LENGTH, longest)
        if settings.sequence_length is None
        else settings.sequence_length
    )
    if not 1 <= wanted <= longest:
        raise BadInput(
            f"--sequence-length {wanted}: give 1 to {longest}, which the model is made for."
        )
    if settings.calibration_tokens < wanted:
        raise BadInput(
            f"--calibration-tokens {settings.calibration_tokens} is not one row of {wanted}; "
            "ask for more, or for a shorter --sequence-length."
        )
    return wanted


def _check_targets(settings: Settings, args: QuantizationArgs, *, weight_only: bool) -> None:
    for target in settings.targets or ("",):
        if target not in TARGETS:
            raise BadInput(f"--target {target or '(none)'}: give {' or '.join(TARGETS)}.")
    if weight_only and args.bits == 8 and "cpu" in settings.targets:
        raise Unsupported(
            "--bits 8 of weights alone: vLLM has no such kernel on a CPU; use --method int8, or "
            "--target cuda alone."
        )


def _fit_groups(layers: estimates.Shapes, wanted: int | None, notes: list[str]) -> int:
    """The group size as set, or the largest that divides the inputs of all layers; 32 always does.
    Raises BadInput for a group size that does not divide them.
    """
    if wanted == CHANNEL:
        return CHANNEL
    fitting = _fitting(layers)
    if wanted is None:
        if fitting[0] != GROUP_SIZES[0]:
            notes.append(
                f"group size {fitting[0]} instead of {GROUP_SIZES[0]}: it divides all layers"
            )
        return fitting[0]
    if wanted not in fitting:
        prefix, inputs = next(
            (prefix, inputs) for prefix, (_, inputs) in layers.items() if inputs % wanted
        )
        raise BadInput(
            f"--group-size {wanted} does not divide the {inputs} inputs of {prefix}; "
            f"{', '.join(map(str, fitting))} and -1 (one scale per output) fit all layers."
        )
    return wanted


def _fitting(layers: estimates.Shapes) -> list[int]:
    """The group sizes that divide the inputs of all layers, largest first."""
    return [size for size in GROUP_SIZES if not any(inputs % size for _, inputs in layers.values())]


def _dtypes(source: Checkpoint) -> tuple[str, str]:
    """The dtype of most numbers on disk, and the dtype in which vLLM runs the model by its config;
    both as in safetensors.
    """
    numbers: dict[str, int] = {}
    for name in source.names():
        shape, dtype = source.shape_and_dtype(name)
        numbers[dtype] = numbers.get(dtype, 0) + prod(shape)
    stored = max(numbers, key=lambda dtype: numbers[dtype])
    text = source.config.get("text_config") or {}
    named = [part.get(key) for part in (source.config, text) for key in ("dtype", "torch_dtype")]
    declared = next((OF_TORCH[name] for name in named if name in OF_TORCH), stored)
    return stored, declared


def _is_tied(source: Checkpoint) -> bool:
    tied = source.config.get("tie_word_embeddings")
    return bool(tied) if tied is not None else not any("lm_head" in n for n in source.names())


def _tensor_parallel(
    source: Checkpoint, layers: estimates.Shapes, scheme: Scheme, family: Family
) -> tuple[int, ...]:
    heads, head_dim = source.number("num_attention_heads"), _head_dim(source)
    if not heads:
        return (1,)
    kv_heads = source.number("num_key_value_heads") or heads
    fused = {
        tuple(family.on_disk(name) for name in group)
        for prefix in {estimates.block_of(name) for name in layers}
        for stage in family.stages(targets.in_block(layers, prefix, family))
        for group in stage
    }
    return estimates.tensor_parallel(
        layers, scheme, sorted(fused), heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )


def _check_unknown(settings: Settings, source: Checkpoint) -> None:
    model_type = source.config.get("model_type")
    if settings.method != "rtn" or settings.kv:
        asked = f"--kv {settings.kv}" if settings.method == "rtn" else f"--method {settings.method}"
        raise Unsupported(
            f"model_type {model_type!r} is not known; known are {', '.join(sorted(FAMILIES))}. "
            f"{asked} needs one of them; --method rtn rounds the linear layers of any model."
        )


def _check_kv(settings: Settings, source: Checkpoint, layout: str) -> bool:
    if settings.kv is None:
        return False
    if settings.kv != "fp8":
        raise BadInput(f"--kv {settings.kv} is not known; give fp8, or leave it out.")
    if layout != FORMATS[0]:
        raise Unsupported(
            f"--kv with --format {layout}: vLLM drops the scales without a word; use --format "
            f"{FORMATS[0]}."
        )
    head_dim = _head_dim(source)
    if not head_dim:
        raise Unsupported("--kv: config.json does not give the head size; leave --kv out.")
    if head_dim % 32 and "cpu" in settings.targets:
        raise Unsupported(
            f"--kv: heads of {head_dim}; vLLM's 8-bit cache on a CPU needs a multiple of 32: leave "
            "--kv out, or use --target cuda alone."
        )
    return True


def _head_dim(source: Checkpoint) -> int:
    heads = source.number("num_attention_heads")
    return source.number("head_dim") or (source.number("hidden_size") // heads if heads else 0)
