"""The layers of the base checkpoint that an adapter may change, read from safetensors headers.

No weights, torch or engine are needed, so adapters can be checked before the engine is built.
Called once, when the server starts.

The names are those of the checkpoint. PEFT saw the same names, except where transformers renames
modules while loading (some multimodal models); adapters for such layers are refused as unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packhorse.serve.adapters.headers import BadHeader, Header, TensorEntry, read_header, shown
from packhorse.serve.errors import Invalid

# The safetensors library's own limit. The largest checkpoints need a tenth of it.
_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 100_000_000
_INDEX = "model.safetensors.index.json"
# Last parts of the names of embeddings and heads. Most embeddings have "embed" in their names.
_NOT_LINEAR = frozenset({"wte", "wpe", "shared", "lm_head"})


def linear_layers(model_folder: Path) -> dict[str, tuple[int, int]]:
    """Every Linear of a checkpoint: module path in the checkpoint ("model.layers.0.mlp.up_proj")
    -> (out_features, in_features).

    Left out are norms (one dimension), fused experts and convolutions (three or more), embeddings
    and lm_head. Embeddings and lm_head are often tied; an adapter would then change both, or, as
    engines implement it, one of them.

    Reads unquantized weights and the layouts compressed-tensors (packed, int8, fp8), GPTQ and AWQ
    (gemm). Raises Invalid when the folder or one of its files cannot be read, or has another
    layout.
    """
    if not model_folder.is_dir():
        raise Invalid(f"{model_folder} is not a folder; give the folder of the base checkpoint.")
    headers = {path: _header(path) for path in _weight_files(model_folder)}
    entries = {
        name: (path, entry)
        for path, header in headers.items()
        for name, entry in header.tensors.items()
    }
    quantization = _quantization(model_folder)
    layers: dict[str, tuple[int, int]] = {}
    for name, (path, entry) in entries.items():
        module, _, kind = name.rpartition(".")
        if not module or _is_table_or_head(module) or len(entry.shape) != 2:
            continue
        beside = {
            part: entries[f"{module}.{part}"][1]
            for part in ("scales", "qzeros", "weight_shape")
            if f"{module}.{part}" in entries
        }
        match kind:
            case "weight":
                if f"{name}.absmax" in entries:
                    raise Invalid(
                        f"{model_folder} is quantized with bitsandbytes, whose files do not say "
                        "how large a layer is; serve the unquantized checkpoint, or one from "
                        "`quantize model`."
                    )
                layers[module] = (entry.shape[0], entry.shape[1])
            case "weight_packed" if "weight_shape" in beside:
                path = entries[f"{module}.weight_shape"][0]
                layers[module] = _read_shape(path, beside["weight_shape"])
            case "weight_packed" if entry.dtype == "U8":  # 4-bit floats, two a byte
                layers[module] = (entry.shape[0], 2 * entry.shape[1])
            case "qweight":
                layers[module] = _unpacked(module, entry, beside, quantization)
    return layers


def _is_table_or_head(module: str) -> bool:
    last = module.rpartition(".")[2]
    return last in _NOT_LINEAR or "embed" in last


def _weight_files(model_folder: Path) -> list[Path]:
    if (model_folder / _INDEX).is_file():
        weight_map = _json(model_folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise Invalid(f"{model_folder / _INDEX} has no weight_map; download it again.")
        shards = {str(shard) for shard in weight_map.values()}
        if strange := sorted(shard for shard in shards if Path(shard).name != shard):
            raise Invalid(
                f"{model_folder / _INDEX} names {shown(strange[0])}, which is not a file of its "
                "folder; download it again."
            )
        return [model_folder / shard for shard in sorted(shards)]
    whole = model_folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(model_folder.glob("*.safetensors"))
    if len(files) != 1:
        raise Invalid(
            f"{model_folder} has {len(files)} safetensors files and no {_INDEX}; give the folder "
            "of a whole checkpoint in safetensors."
        )
    return files


def _header(path: Path) -> Header:
    # Follows links: a hub cache consists of links, and the operator has chosen this folder.
    try:
        with path.open("rb") as file:
            return read_header(file, max_bytes=_MAX_HEADER_BYTES)
    except BadHeader as error:
        raise Invalid(f"{path} {error}.") from error
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}; restore the file.") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise Invalid(f"{path} cannot be read as JSON: {error}; download it again.") from error
    if not isinstance(document, dict):
        raise Invalid(f"{path} does not hold a JSON object; download it again.")
    return document


def _quantization(model_folder: Path) -> dict[str, Any]:
    path = model_folder / "config.json"
    found = _json(path).get("quantization_config") if path.exists() else None
    return found if isinstance(found, dict) else {}


def _read_shape(path: Path, entry: TensorEntry) -> tuple[int, int]:
    """The values of a `weight_shape` tensor. The shape of the packed weight does not give them: its
    rows may be padded to whole words.
    """
    width = (entry.end - entry.start) // 2
    if entry.dtype not in ("I64", "I32") or math.prod(entry.shape) != 2:
        raise Invalid(f"{path} has a weight_shape that is not two integers; quantize it again.")
    with path.open("rb") as file:
        file.seek(entry.start)
        values = file.read(2 * width)
    outputs, inputs = (
        int.from_bytes(values[at : at + width], "little", signed=True) for at in (0, width)
    )
    return outputs, inputs


def _unpacked(
    module: str,
    qweight: TensorEntry,
    beside: Mapping[str, TensorEntry],
    quantization: Mapping[str, Any],
) -> tuple[int, int]:
    """GPTQ packs along the inputs, qweight (I*bits/32, O); AWQ along the outputs: (I, O*bits/32).

    Source: the layouts in vLLM 0.32, model_executor/layers/quantization/auto_{gptq,awq}.py.
    """
    rows, columns = qweight.shape
    bits = quantization.get("bits", quantization.get("w_bit"))
    if "scales" in beside and "qzeros" in beside:
        # (G, O) and (G, O*bits/32). Layers of one checkpoint may differ in their bits.
        bits = 32 * beside["qzeros"].shape[-1] // max(1, beside["scales"].shape[-1])
    if type(bits) is not int or not 1 <= bits <= 16:
        raise Invalid(
            f"{module} is packed with {shown(bits)} bits by its config.json, and 1 to 16 can be; "
            "quantize the checkpoint again."
        )
    match quantization.get("quant_method"):
        case "gptq":
            return columns, rows * 32 // bits
        case "awq" if str(quantization.get("version", "gemm")).lower() == "gemm":
            return columns * 32 // bits, rows
    raise Invalid(
        f"{module} is packed, and config.json's quantization_config (quant_method "
        f"{shown(quantization.get('quant_method'))}, version {shown(quantization.get('version'))}) "
        "is not known here; known are gptq, awq (gemm) and compressed-tensors."
    )
