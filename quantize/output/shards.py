"""Merge safetensors files into shards, without holding a tensor in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from packhorse.quantize.model.dtypes import bytes_of

LENGTH_BYTES = 8
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: its entry in the header, and the offset of its bytes."""

    name: str
    entry: dict[str, Any]
    path: Path
    start: int

    @property
    def size(self) -> int:
        begin, end = self.entry["data_offsets"]
        return int(end - begin)

    @property
    def alignment(self) -> int:
        """In bytes."""
        return bytes_of(self.entry["dtype"])


def shards_of(sizes: Mapping[str, int], limit_bytes: int) -> list[tuple[str, list[str]]]:
    """Distribute files, in their order, over shards of about the limit. Returns (name of the shard,
    its files); the names are those that readers of checkpoints expect.
    """
    found: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not found or filled + size > limit_bytes:
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += size
    if len(found) == 1:
        return [("model.safetensors", found[0])]
    return [
        (f"model-{number:05d}-of-{len(found):05d}.safetensors", members)
        for number, members in enumerate(found, start=1)
    ]


def merge(parts: Sequence[Path], target: Path) -> None:
    """Write one safetensors file with the tensors of several. The widest dtypes come first, so that
    all tensors are aligned, and then names in order, so that equal parts give equal bytes.
    """
    tensors = [stored for part in parts for stored in _tensors_of(part)]
    tensors.sort(key=lambda stored: (-stored.alignment, stored.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for stored in tensors:
        header[stored.name] = {**stored.entry, "data_offsets": [offset, offset + stored.size]}
        offset += stored.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        file.write(text)
        for stored in tensors:
            with stored.path.open("rb") as part:
                part.seek(stored.start)
                _copy(part, file, stored.size)


def index_of(shards: Sequence[Path]) -> dict[str, Any]:
    """The index of several shards: each tensor's file, and the bytes of all tensors."""
    found = [stored for shard in shards for stored in _tensors_of(shard)]
    return {
        "metadata": {"total_size": sum(stored.size for stored in found)},
        "weight_map": {stored.name: stored.path.name for stored in sorted(found, key=_name)},
    }


def _name(stored: _Stored) -> str:
    return stored.name


def _tensors_of(path: Path) -> list[_Stored]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = LENGTH_BYTES + length
    return [
        _Stored(name, entry, path, data + entry["data_offsets"][0])
        for name, entry in header.items()
    ]


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    while size:
        block = source.read(min(size, COPY_BYTES))
        if not block:
            raise EOFError(f"{source.name} ends too early")
        target.write(block)
        size -= len(block)
