"""Bytes and bits per weight of a checkpoint, with what was not quantized, from its headers alone.

A weight counts once, as stored: a head that shares the embeddings' tensor adds nothing. Scales,
zero points and shapes are no weights, but their bytes are the price of having few bits, so they
count as bytes. Called by `run` for the report, and by `distance`.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

from packhorse.quantize.model.checkpoint import Checkpoint

# What says that a layer is quantized, in any layout that `formats` reads.
_MARKS = (".weight_packed", ".qweight", ".weight_scale", ".weight_scale_inv")
# Kept in the checkpoint but not learned: a cache's scales, and what is computed from the config.
_NOT_WEIGHTS = (".k_scale", ".v_scale", ".q_scale", ".inv_freq")
LARGEST = 5
"""So many of the tensors that stay as they are get named."""


def of(folder: Path) -> dict[str, Any]:
    """What the tensors of a checkpoint folder take.

    Returns bytes, parameters and bits_per_weight of all; the same under "quantized" (None where
    nothing is) and "left_alone", whose "largest" names the tensors that weigh most. Reads headers,
    and the two numbers of each compressed-tensors `weight_shape`. Raises BadInput for a folder that
    is no checkpoint.
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


def bits_of(dtype: str) -> int:
    """Of one number, from a safetensors dtype such as BF16, F8_E4M3, I32 or BOOL."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _weights(checkpoint: Checkpoint, prefix: str, part: str, shape: list[int]) -> int:
    """How many weights one tensor of a quantized layer holds; 0 for scales and the like."""
    match part:
        case "weight":
            return prod(shape)
        case "weight_packed":
            # Other tools fill up the last word, so the words say too much.
            return int(checkpoint.get(f"{prefix}.weight_shape").prod())
        case "qweight":
            bits = int(checkpoint.config["quantization_config"].get("bits", 4))
            return prod(shape) * 32 // bits
    return 0


def _figures(parameters: int, size: int) -> dict[str, Any]:
    bits = round(8 * size / parameters, 3) if parameters else None
    return {"parameters": parameters, "bytes": size, "bits_per_weight": bits}
