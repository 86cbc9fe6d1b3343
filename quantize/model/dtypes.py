"""Dtypes of safetensors: bits per number, and torch's names for those that models run in."""

from __future__ import annotations

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8,
    "C64": 64, "BOOL": 8,
}  # fmt: skip
"""Every dtype of the safetensors format, version 0.8."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes of weights that are not quantized."""
OF_TORCH = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""A config's `dtype`, which has torch's name, to the name in safetensors."""


def bits_of(dtype: str) -> int:
    """Bits per number of a safetensors dtype, such as BF16, F8_E4M3 or BOOL."""
    return BITS[dtype]


def bytes_of(dtype: str) -> int:
    """Bytes per number; 1 for numbers of fewer than 8 bits. The alignment of a tensor, too."""
    return max(1, BITS[dtype] // 8)
