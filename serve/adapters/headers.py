"""The header of a safetensors file: names, dtypes, shapes and offsets of its tensors.

The file is not trusted, so every entry is checked. Called by `formats` for adapters and by
`base_layers` for the base checkpoint.

Source: the format section of github.com/huggingface/safetensors, and its own validation.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

# Bytes per element. Types below a byte and later ones are left out: their sizes are not checked,
# and callers that need a known type check for it.
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
_LENGTH_BYTES = 8
_METADATA = "__metadata__"


class BadHeader(ValueError):
    """Not a complete safetensors file. The message is a predicate: the caller puts the file's name
    before it.
    """


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor. `start` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """`digest` is the sha256 of the bytes before the tensors' data, `file_bytes` the size of the
    whole file.
    """

    tensors: Mapping[str, TensorEntry]
    digest: str
    file_bytes: int


def shown(name: object) -> str:
    """An untrusted value for a message: quoted, without control characters, at most 200 long."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:200]}..."


def read_header(file: BinaryIO, *, max_bytes: int) -> Header:
    """Read and check the header of a file whose position is at its beginning.

    max_bytes limits the header, not the file. Raises BadHeader when the header is larger,
    malformed, or does not describe the file: tensors must follow each other without a gap, from the
    end of the header to the end of the file.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    length = file.read(_LENGTH_BYTES)
    if len(length) < _LENGTH_BYTES:
        raise BadHeader(f"has {file_bytes} bytes, too few for a safetensors file; save it again")
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > max_bytes:
        raise BadHeader(
            f"says that its header has {header_bytes} bytes, and {max_bytes} are the limit; "
            "it is damaged or no safetensors file, save it again"
        )
    text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise BadHeader(
            f"ends within its header, after {file_bytes} bytes: it is truncated; copy it again"
        )
    data_start = _LENGTH_BYTES + header_bytes
    tensors = {
        name: _entry(name, value, data_start)
        for name, value in _parse(text).items()
        if name != _METADATA
    }
    _check_offsets(tensors, data_start, file_bytes)
    return Header(tensors, hashlib.sha256(length + text).hexdigest(), file_bytes)


def _parse(text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Of two entries with one name, different parsers take different ones.
        document = dict(pairs)
        if len(document) < len(pairs):
            raise BadHeader("has a header that names something twice; save it again")
        return document

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except BadHeader:
        raise
    except (ValueError, RecursionError) as error:
        raise BadHeader("has a header that is not JSON: it is no safetensors file") from error
    if not isinstance(document, dict):
        raise BadHeader("has a header that is not a JSON object: it is no safetensors file")
    return document


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            all(_is_count(number) for number in (*shape, start, end)) and start <= end
        ):
            entry = TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)
        case _:
            raise BadHeader(
                f"describes the tensor {shown(name)} in no known way: {shown(value)}; save it again"
            )
    size = DTYPE_BYTES.get(dtype)
    if size is not None and math.prod(shape) * size != end - start:
        raise BadHeader(
            f"gives the tensor {shown(name)} {end - start} bytes, and {dtype} of shape {shape} "
            f"takes {math.prod(shape) * size}; save it again"
        )
    return entry


def _is_count(number: Any) -> bool:
    # The bound is the format's own, 64 bits; bool is an int to Python.
    return type(number) is int and 0 <= number < 1 << 63


def _check_offsets(tensors: Mapping[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    expected = data_start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != expected:
            kind = "overlaps with" if entry.start < expected else "leaves a gap after"
            raise BadHeader(
                f"has wrong offsets: the tensor {shown(name)} {kind} the one before it; "
                "save it again"
            )
        expected = entry.end
    if expected > file_bytes:
        raise BadHeader(
            f"has {file_bytes} bytes, and its tensors end at {expected}: it is truncated; "
            "copy it again"
        )
    if expected < file_bytes:
        raise BadHeader(
            f"has {file_bytes} bytes, {file_bytes - expected} more than its tensors take; "
            "save it again"
        )
