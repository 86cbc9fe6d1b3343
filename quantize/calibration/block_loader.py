"""Load a checkpoint one decoder block at a time, so that memory does not grow with depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import Family


@dataclass(frozen=True)
class Block:
    """The tensors of one decoder block, by full name, as they are on disk."""

    index: int
    prefix: str
    tensors: dict[str, Tensor]


def count_blocks(checkpoint: Checkpoint, family: Family) -> int:
    """The number of decoder blocks on disk. The planner has checked that none is missing."""
    return 1 + max(_index_of(name, family) for name in checkpoint.names())


def load_blocks(checkpoint: Checkpoint, family: Family, start: int = 0) -> Iterator[Block]:
    """The blocks from index `start` on. Each is read when the caller asks for it."""
    for index in range(start, count_blocks(checkpoint, family)):
        prefix = f"{family.block_prefix}{index}."
        names = [name for name in _names(checkpoint) if name.startswith(prefix)]
        yield Block(index, prefix, {name: checkpoint.get(name) for name in names})


def names_outside_blocks(checkpoint: Checkpoint, family: Family) -> list[str]:
    """The names of the tensors that belong to no block: embeddings, final norm, head."""
    return [name for name in _names(checkpoint) if _index_of(name, family) < 0]


def largest_block(checkpoint: Checkpoint, family: Family) -> int:
    """The index of the block with the most parameters; of equal ones the first."""
    sizes: Counter[int] = Counter()
    for name in _names(checkpoint):
        sizes[_index_of(name, family)] += prod(checkpoint.shape_and_dtype(name)[0])
    del sizes[-1]
    return min(sizes, key=lambda index: (-sizes[index], index))


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    """All tensor names but the rotary buffers of old checkpoints, which transformers computes."""
    return (name for name in checkpoint.names() if not name.endswith("rotary_emb.inv_freq"))


def _index_of(name: str, family: Family) -> int:
    """The block's index; -1 outside the blocks."""
    if not name.startswith(family.block_prefix):
        return -1
    return int(name.removeprefix(family.block_prefix).split(".", 1)[0])
