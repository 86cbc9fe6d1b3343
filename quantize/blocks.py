"""Walk a checkpoint one decoder block at a time, so that memory does not grow with depth.

What is outside the blocks (embeddings, final norm, head) comes first, as block -1, and is never
quantized. Capturing a block's inputs for calibrated methods will live here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from quantize.checkpoint import Checkpoint
from quantize.errors import BadInput
from quantize.families import Family


@dataclass(frozen=True)
class Block:
    """One decoder block: its tensors by full name, read from disk when the walk reaches it."""

    index: int
    prefix: str
    tensors: dict[str, Tensor]


def count_blocks(checkpoint: Checkpoint, family: Family) -> int:
    """How many decoder blocks the tensors on disk make. Raises BadInput when the config says
    otherwise.
    """
    indices = {_index_of(name, family) for name in checkpoint.names()} - {-1}
    expected = checkpoint.config.get("num_hidden_layers")
    if indices != set(range(len(indices))) or len(indices) != expected:
        raise BadInput(
            f"{checkpoint.folder}: config.json speaks of {expected} blocks, the weights hold "
            f"{len(indices)}; the checkpoint is incomplete."
        )
    return len(indices)


def walk(checkpoint: Checkpoint, family: Family) -> Iterator[Block]:
    """Block -1 (everything outside), then 0, 1, ...; each is freed when the caller moves on."""
    names: dict[int, list[str]] = {
        index: [] for index in range(-1, count_blocks(checkpoint, family))
    }
    for name in checkpoint.names():
        names[_index_of(name, family)].append(name)
    for index, members in names.items():
        prefix = f"{family.block_prefix}{index}." if index >= 0 else ""
        yield Block(index, prefix, {name: checkpoint.get(name) for name in members})


def _index_of(name: str, family: Family) -> int:
    if not name.startswith(family.block_prefix):
        return -1
    return int(name.removeprefix(family.block_prefix).split(".", 1)[0])
