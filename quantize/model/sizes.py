"""Bytes and bits per weight of a checkpoint, of its quantized and of its other tensors, from file
headers.

A weight counts once, as stored: a head that shares the embeddings' tensor adds nothing. Scales,
zero points and shapes count as bytes, but not as weights. Called by run.py for the report, and by
quality/divergence.py.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.dtypes import bits_of

# Name endings that mark a quantized layer, in every layout that formats/ reads.
_MARKS = (".weight_packed", ".qweight", ".weight_scale", ".weight_scale_inv")
# Tensors that are not learned: scales of the KV cache, and buffers computed from the config.
_NOT_WEIGHTS = (".k_scale", ".v_scale", ".q_scale", ".inv_freq")
LARGEST = 5
"""How many of the unquantized tensors are named."""


def of(folder: Path) -> dict[str, Any]:
    """The sizes of a checkpoint folder.

    Returns bytes, parameters and bits_per_weight of all tensors, and the same under "quantized"
    (None without quantized layers) and "left_alone", whose "largest" names the largest tensors.
    Reads headers, and the two numbers of each compressed-tensors `weight_shape`. Raises BadInput
    for a folder that is no checkpoint.
    """
    checkpoint = Checkpoint(folder)
    names = checkpoint.names()
    prefixes = {name.removesuffix(mark) for name in names for mark in _MARKS if name.endswith(mark)}
    packed, plain = [0, 0], [0, 0]  # parameters, bytes
    largest = []
    for name in names:
        shape, dtype = checkpoint.shape_and_dtype(name)
        size = prod(shape) * bits_of(dtype) // 8
        prefix, _, part = name.rpartition(".")
        if prefix in prefixes and part != "bias":
            packed[0] += _weights(checkpoint, prefix, part, shape)
            packed[1] += size
        else:
            plain[0] += 0 if name.endswith(_NOT_WEIGHTS) else prod(shape)
            plain[1] += size
            largest.append((-size, name, dtype))
    heavy = [
        {"name": name, "bytes": -size, "dtype": dtype}
        for size, name, dtype in sorted(largest)[:LARGEST]
    ]
    return {
        **_figures(packed[0] + plain[0], packed[1] + plain[1]),
        "quantized": {"layers": len(prefixes), **_figures(*packed)} if prefixes else None,
        "left_alone": {**_figures(*plain), "largest": heavy},
    }


def _weights(checkpoint: Checkpoint, prefix: str, part: str, shape: list[int]) -> int:
    """The number of weights in one tensor of a quantized layer; 0 for scales and the like."""
    match part:
        case "weight":
            return prod(shape)
        case "weight_packed":
            # Other tools pad the last word, so the words may hold more than the weights.
            return int(checkpoint.get(f"{prefix}.weight_shape").prod())
        case "qweight":
            bits = int(checkpoint.config["quantization_config"].get("bits", 4))
            return prod(shape) * 32 // bits
    return 0


def _figures(parameters: int, size: int) -> dict[str, Any]:
    bits = round(8 * size / parameters, 3) if parameters else None
    return {"parameters": parameters, "bytes": size, "bits_per_weight": bits}
