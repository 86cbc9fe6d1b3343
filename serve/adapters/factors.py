"""The tensors of an adapter, paired into the factors of one layer of the base each.

PEFT's LoRA stores "base_model.model.<module>.lora_A.weight" (r, in) and lora_B.weight (out, r). Its
AdaLoRA stores lora_A (r, in), lora_B (out, r) and lora_E (r, 1), without ".weight". Called by
`formats`; judged from names and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from packhorse.serve.adapters.configs import MERGE, RETRAIN, Kind
from packhorse.serve.adapters.headers import TensorEntry, shown
from packhorse.serve.errors import Invalid

PREFIX = "base_model.model."
DTYPES = ("F32", "F16", "BF16")
_NAMES: Mapping[Kind, re.Pattern[str]] = {
    "lora": re.compile(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight"),
    "adalora": re.compile(rf"{re.escape(PREFIX)}(.+)\.(lora_[ABE])"),
}
_PARTS: Mapping[Kind, tuple[str, ...]] = {
    "lora": ("lora_A", "lora_B"),
    "adalora": ("lora_A", "lora_B", "lora_E"),
}
_SAVE_AGAIN = "save it with the PEFT model's save_pretrained()"
_NO_EMBEDDINGS = (
    "train without embeddings in target_modules and save with save_embedding_layers=False, or "
    f"{MERGE}"
)
# (part of a tensor's name, what such a tensor is, the way out); the first match counts.
_STRANGERS = (
    ("lora_magnitude_vector", "is DoRA's, which the engine does not have", MERGE),
    ("lora_embedding_", "adapts the embeddings, which stay the base's",
     _NO_EMBEDDINGS),
    ("trainable_tokens", "changes the embeddings, which stay the base's", MERGE),
    ("modules_to_save", "replaces a layer of the base", f"train without it, or {MERGE}"),
    ("base_layer.", "is a copy of the base's own layer, which PEFT saves when the vocabulary has "
     "grown or embeddings are trained", _NO_EMBEDDINGS),
    ("embed_tokens.weight", "replaces the embeddings, as PEFT saves them when the vocabulary has "
     "grown", _NO_EMBEDDINGS),
    ("lm_head.weight", "replaces the output layer", f"train without modules_to_save, or {MERGE}"),
    ("ia3_", "is IA3's, which the engine does not have", MERGE),
    ("prompt_embeddings", "belongs to prompt tuning, which the engine does not have", RETRAIN),
    (".bias", "is a bias, which the engine does not apply", f"train with bias='none', or {MERGE}"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factors:
    """The names of one module's tensors, by part ("lora_A", ...), and their rank."""

    names: Mapping[str, str]
    rank: int


def find_factors(
    tensors: Mapping[str, TensorEntry], kind: Kind, layers: Mapping[str, tuple[int, int]]
) -> dict[str, Factors]:
    """Module -> its factors, sorted by module. `layers` are those of the base: module -> (out, in).

    Raises Invalid when there are no tensors; for a tensor that belongs to no layer of the base, or
    is not of this kind, since it would have no effect; for one without its counterpart, with a
    dtype other than DTYPES, or with a shape that does not fit.
    """
    if not tensors:
        raise Invalid(f"adapter_model.safetensors holds no tensors; {_SAVE_AGAIN}.")
    modules: dict[str, dict[str, str]] = {}
    for name, entry in tensors.items():
        found = _NAMES[kind].fullmatch(name)
        if found is None:
            _refuse_name(name, kind)
        if entry.dtype not in DTYPES:
            raise Invalid(
                f"{shown(name)} is of type {shown(entry.dtype)}, and {', '.join(DTYPES)} are "
                f"served; convert it to one of these."
            )
        modules.setdefault(found[1], {})[found[2]] = name
    unknown = sorted(modules.keys() - layers.keys())
    if unknown:
        entry = tensors[next(iter(modules[unknown[0]].values()))]
        _refuse_module(unknown, entry, layers)
    return {
        module: _fitting(module, names, tensors, kind, layers[module])
        for module, names in sorted(modules.items())
    }


def _refuse_name(name: str, kind: Kind) -> NoReturn:
    for part, what, way_out in _STRANGERS:
        if part in name:
            raise Invalid(f"The tensor {shown(name)} {what}; {way_out}.")
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", name):
        what = "has an adapter's name in it, as a raw state_dict has"
    elif kind == "lora" and "lora_E" in name:
        what = "is AdaLoRA's, and adapter_config.json says peft_type LORA"
    elif not name.startswith(PREFIX):
        what = f"does not begin with {PREFIX}, as PEFT's do"
    else:
        parts = " or ".join(_PARTS[kind])
        what = f"is not a {parts} of peft_type {kind.upper()}, and nothing would use it"
    raise Invalid(f"The tensor {shown(name)} {what}; {_SAVE_AGAIN}.")


def _refuse_module(
    unknown: list[str], entry: TensorEntry, layers: Mapping[str, tuple[int, int]]
) -> NoReturn:
    module = unknown[0]
    last = module.rpartition(".")[2]
    if last == "lm_head" or "embed" in last:
        raise Invalid(
            f"The adapter changes {shown(module)}, and embeddings and output layers stay the "
            f"base's; train without it in target_modules, or {MERGE}."
        )
    more = f" (and {len(unknown) - 1} others)" if len(unknown) > 1 else ""
    alike = {size for name, sizes in layers.items() if name.endswith(f".{last}") for size in sizes}
    if not alike:
        hint = f"no layer of it is called {shown(last)}"
    elif max(entry.shape, default=0) not in alike:
        hint = f"its {last} layers have the sizes {_sorted(alike)}, the tensor {list(entry.shape)}"
    else:
        hint = "layers of that name and size it has elsewhere"
    raise Invalid(
        f"The base has no layer {shown(module)}{more}: {hint}. The adapter was probably trained "
        "for another base model; serve it on that one, or train it again on this one."
    )


def _sorted(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))


def _fitting(
    module: str,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorEntry],
    kind: Kind,
    layer: tuple[int, int],
) -> Factors:
    for part in _PARTS[kind]:
        if part not in names:
            found = " and ".join(sorted(names))
            raise Invalid(
                f"{module} has {found} and no {part}: the file is incomplete; {_SAVE_AGAIN}."
            )
    shape_a = tensors[names["lora_A"]].shape
    rank = shape_a[0] if shape_a else 0
    outputs, inputs = layer
    expected = {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_E": (rank, 1)}
    for part in _PARTS[kind]:
        shape = tensors[names[part]].shape
        if shape != expected[part]:
            raise Invalid(
                f"{module}.{part} has the shape {list(shape)}, and {list(expected[part])} fits the "
                f"base's layer of {inputs} inputs and {outputs} outputs"
                f"{_other_base(module, part, shape, layer)}. {_CHECK_BASE}"
            )
    return Factors(dict(names), rank)


_CHECK_BASE = (
    "Serve it on the base that it was trained for, or train it again on this one; after an "
    "unfinished save, save it again."
)


def _other_base(module: str, part: str, shape: tuple[int, ...], layer: tuple[int, int]) -> str:
    if len(shape) != 2:
        return ""
    outputs, inputs = layer
    if part == "lora_A" and shape[1] != inputs:
        if re.search(r"(q|k|v|qkv|gate|up|gate_up)_proj$", module):
            return f": trained for a base with hidden size {shape[1]}?"
        return f": trained for a base with {shape[1]} inputs there?"
    if part == "lora_B" and shape[0] != outputs:
        return f": trained for a base with {shape[0]} outputs there?"
    return ""
