"""Walk a checkpoint one decoder block at a time, so that memory does not grow with depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import Family
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One decoder block: its tensors by full name, read from disk when the walk reaches it."""

    index: int
    prefix: str
    tensors: dict[str, Tensor]


def count_blocks(checkpoint: Checkpoint, family: Family) -> int:
    """How many decoder blocks the tensors on disk make; the planner has seen that all are there."""
    return 1 + max(_index_of(name, family) for name in checkpoint.names())


def walk(checkpoint: Checkpoint, family: Family, start: int = 0) -> Iterator[Block]:
    """Blocks `start`, ...; each is freed when the caller moves on."""
    for index in range(start, count_blocks(checkpoint, family)):
        prefix = f"{family.block_prefix}{index}."
        names = [name for name in _names(checkpoint) if name.startswith(prefix)]
        yield Block(index, prefix, {name: checkpoint.get(name) for name in names})


def outside(checkpoint: Checkpoint, family: Family) -> list[str]:
    """The names of tensors that are in no block: embeddings, final norm, head."""
    return [name for name in _names(checkpoint) if _index_of(name, family) < 0]


def largest_block(checkpoint: Checkpoint, family: Family) -> int:
    """The first of those with the most numbers."""
    sizes: Counter[int] = Counter()
    for name in _names(checkpoint):
        sizes[_index_of(name, family)] += prod(checkpoint.shape_and_dtype(name)[0])
    del sizes[-1]
    return min(sizes, key=lambda index: (-sizes[index], index))


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    """But for what is in old checkpoints and is computed now."""
    return (name for name in checkpoint.names() if not name.endswith("rotary_emb.inv_freq"))


def _index_of(name: str, family: Family) -> int:
    if not name.startswith(family.block_prefix):
        return -1
    return int(name.removeprefix(family.block_prefix).split(".", 1)[0])
