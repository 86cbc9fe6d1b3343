"""adapter_config.json: parsing, and whether the engine can serve an adapter with this
configuration.

At least as strict as vLLM 0.32 (lora/peft_helper.py), which ignores many fields that it does not
know. An adapter that would load and answer wrongly is refused. Called by `formats`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from packhorse.serve.adapters.headers import shown
from packhorse.serve.errors import Invalid

Kind = Literal["lora", "adalora"]
NAME = "adapter_config.json"
# AdaLoRA lists each rank of each module: about 2 MB for the largest models.
MAX_BYTES = 8 * 2**20
_MAX_ALPHA = 1e6

MERGE = (
    "merge it into the base with PEFT's merge_and_unload() and run `quantize model` on the result"
)
RETRAIN = "train it again with LoraConfig"
CONVERT = (
    "save it as a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or "
    f"{MERGE}"
)
# peft_types whose effect depends on the input or on added tokens, so they cannot be merged.
_CANNOT_MERGE = frozenset({
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE", "BOTTLENECK", "XLORA", "POLY",
})  # fmt: skip
# Fields that are refused when they are set: field -> what it means, and the way out.
_REFUSED = {
    "use_dora": ("is DoRA, which the engine does not have", MERGE),
    "lora_bias": (
        "has biases, which the engine does not apply", "train again with lora_bias=False",
    ),
    "alora_invocation_tokens": (
        "is an activated LoRA (aLoRA), which the engine does not have", RETRAIN,
    ),
    "layer_replication": ("repeats layers of the base, which the engine does not do", MERGE),
    "use_qalora": ("is QALoRA, which the engine does not have", MERGE),
    "use_bdlora": ("is block-diagonal LoRA, which the engine does not have", MERGE),
    "modules_to_save": (
        "comes with whole layers, which the engine takes from the base alone",
        f"train without modules_to_save, or {MERGE}",
    ),
    "trainable_token_indices": ("changes the embeddings, which stay the base's", MERGE),
    "target_parameters": ("adapts parameters that are not Linear layers", MERGE),
    "monteclora_config": ("is MonteCLoRA, which the engine does not have", RETRAIN),
    "kasa_config": ("is KaSA, which changes the base too", MERGE),
    "velora_config": ("is VeLoRA, whose additional tensors nobody would use", MERGE),
    "arrow_config": ("chooses among adapters by the input, which the engine does not", RETRAIN),
}  # fmt: skip
# These initializations only choose where training starts. The others move a part of the base into
# the adapter, which then fits no base on disk.
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# Fields that are checked elsewhere, or that training sets and inference does not use.
_KNOWN = frozenset({
    "r", "init_r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "inference_mode", "fan_in_fan_out", "auto_mapping", "ensure_weight_tying",
    "eva_config", "corda_config", "loftq_config", "lora_ga_config", "megatron_config",
    "runtime_config",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields of a configuration that change what is computed.

    `rank` is LoRA's r, or AdaLoRA's init_r. `masks` (AdaLoRA): for some modules, which of the
    init_r ranks were kept.
    """

    kind: Kind
    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    masks: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)


def parse(text: bytes) -> dict[str, Any]:
    """The document. Raises Invalid when it is not a JSON object, or has NaN or Infinity in it."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        document = json.loads(text.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{NAME} is not JSON: {error}; save the adapter again.") from error
    if not isinstance(document, dict):
        raise Invalid(f"{NAME} does not hold a JSON object; save the adapter again.")
    return document


def judge(document: Mapping[str, Any]) -> AdapterConfig:
    """The configuration, as the engine needs it. Raises Invalid, with the way out, for features
    that the engine lacks and for invalid values.
    """
    kind = _kind(document.get("peft_type"))
    _refuse_features(document)
    alpha = _alpha("lora_alpha", document.get("lora_alpha"))
    if kind == "adalora":
        # PEFT ignores use_rslora and alpha_pattern here, and r.
        if alpha <= 0:
            raise Invalid(
                f"{NAME} has lora_alpha={shown(alpha)}, and AdaLoRA's must be above 0; correct it."
            )
        rank = _rank("init_r", document.get("init_r"))
        masks = _masks(document.get("rank_pattern"), rank)
        return AdapterConfig(kind, rank, alpha, masks=masks)
    return AdapterConfig(
        kind,
        _rank("r", document.get("r")),
        alpha,
        use_rslora=bool(document.get("use_rslora")),
        rank_pattern={
            key: _rank(f"rank_pattern[{shown(key)}]", value)
            for key, value in _object(document, "rank_pattern").items()
        },
        alpha_pattern={
            key: _alpha(f"alpha_pattern[{shown(key)}]", value)
            for key, value in _object(document, "alpha_pattern").items()
        },
    )


def _kind(peft_type: Any) -> Kind:
    match peft_type:
        case "LORA":
            return "lora"
        case "ADALORA":
            return "adalora"
        case None:
            raise Invalid(f"{NAME} has no peft_type, so it is not PEFT's; {RETRAIN}.")
    way_out = RETRAIN if str(peft_type) in _CANNOT_MERGE else f"{MERGE}, or {RETRAIN}"
    raise Invalid(
        f"{NAME} has peft_type={shown(peft_type)}, and the engine serves LORA and ADALORA; "
        f"{way_out}."
    )


def _refuse_features(document: Mapping[str, Any]) -> None:
    for key, (what, way_out) in _REFUSED.items():
        value = document.get(key)
        # An empty config object is a config; False, None and an empty list are none.
        if value or value == {}:
            raise Invalid(f"{NAME} has {key}={shown(value)}: it {what}; {way_out}.")
    bias = document.get("bias", "none")
    if bias != "none":
        raise Invalid(
            f"{NAME} has bias={shown(bias)}, and the engine applies none; train with bias='none', "
            f"or {MERGE}."
        )
    init = document.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        raise Invalid(
            f"{NAME} has init_lora_weights={shown(init)}, which trains against a changed base; "
            f"{CONVERT}."
        )
    for key, value in document.items():
        # Fields of later versions of PEFT: flags are booleans, settings of methods are objects.
        known = key in _REFUSED or key in _KNOWN
        if not known and (value is True or (isinstance(value, dict) and value)):
            raise Invalid(
                f"{NAME} has {shown(key)}={shown(value)}, which this server does not know and the "
                "engine would ignore; remove it if it does not change what the adapter computes, "
                f"else {MERGE}."
            )


def _object(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Invalid(f"{NAME} has {key}={shown(value)}, which must be an object; correct it.")
    return value


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise Invalid(
            f"{NAME} has {name}={shown(value)}, and a rank is a whole number from 1 up; correct "
            "it, or train again with a rank."
        )
    return value


def _alpha(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not -_MAX_ALPHA <= value <= _MAX_ALPHA:
        raise Invalid(
            f"{NAME} has {name}={shown(value)}, and it must be a number of at most "
            f"{_MAX_ALPHA:.0f}; correct it."
        )
    return float(value)


def _masks(rank_pattern: Any, rank: int) -> dict[str, tuple[bool, ...]]:
    """Keys are "<module>.lora_E", as PEFT saves them, or "<module>.lora_E.<adapter>" as it names
    them while training.
    """
    if rank_pattern is None:
        return {}
    masks: dict[str, tuple[bool, ...]] = {}
    items = rank_pattern.items() if isinstance(rank_pattern, dict) else [("", rank_pattern)]
    for key, mask in items:
        module, found, _ = key.rpartition(".lora_E")
        if not (
            found and isinstance(mask, list) and len(mask) == rank
            and all(type(kept) is bool for kept in mask)
        ):  # fmt: skip
            raise Invalid(
                f"{NAME} has rank_pattern[{shown(key)}]={shown(mask)}, and AdaLoRA's is a list of "
                f"init_r={rank} times true or false under a module's name with .lora_E; save the "
                "adapter again."
            )
        masks[module] = tuple(mask)
    return masks
