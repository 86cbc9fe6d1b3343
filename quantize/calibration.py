"""Calibration text -> rows of token ids. Seeded, so that a run can be repeated; hashed, so that a
report says on what.

Text is rendered with the model's own chat template where it is a conversation, and packed end to
end into rows of one length: no padding, no half-used row.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantize.checkpoint import sha256_of
from quantize.errors import BadInput
from quantize.evaluate import read_texts, read_utf8

ENOUGH_TOKENS = 64 * 1024  # below this the statistics of a layer are noise


@dataclass(frozen=True)
class Calibration:
    """Token ids int64 (rows, row_tokens), and where they are from."""

    rows: Tensor
    files: tuple[Path, ...]

    @property
    def num_tokens(self) -> int:
        return self.rows.numel()

    def as_json(self) -> dict[str, object]:
        return {
            "files": [path.name for path in self.files],
            "sha256": sha256_of(list(self.files)),
            "tokens": self.num_tokens,
            "row_tokens": self.rows.shape[1],
        }


def read(
    place: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    row_tokens: int,
    seed: int,
    force: bool = False,
) -> Calibration:
    """Rows from a file, or from all *.jsonl and *.txt of a folder, shuffled by `seed`.

    JSON lines hold `messages` or `text`; a .txt file is one text a paragraph. Raises BadInput when
    nothing is there, or less than ENOUGH_TOKENS unless `force`.
    """
    files = _files(place)
    texts: list[list[int]] = []
    for path in files:
        if path.suffix == ".txt":
            paragraphs = read_utf8(path).split("\n\n")
            texts += [list(tokenizer.encode(part)) for part in paragraphs if part.strip()]
        else:
            texts += read_texts(path, tokenizer)
    random.Random(seed).shuffle(texts)
    stream = list(itertools.islice(itertools.chain.from_iterable(texts), max_tokens))
    if len(stream) < ENOUGH_TOKENS and not force:
        if len(stream) == max_tokens:
            raise BadInput(
                f"--calibration-tokens {max_tokens} is below the {ENOUGH_TOKENS} that give a "
                "stable result; ask for more, or pass --force."
            )
        raise BadInput(
            f"{place} has {len(stream)} tokens for calibration, below the {ENOUGH_TOKENS} that "
            "give a stable result; add text of the kind the model will see, or pass --force."
        )
    row_tokens = min(row_tokens, len(stream))
    if not row_tokens:
        raise BadInput(f"{place} holds no text.")
    count = len(stream) // row_tokens
    rows = torch.tensor(stream[: count * row_tokens]).reshape(count, row_tokens)
    return Calibration(rows, tuple(files))


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        files = sorted(path for path in place.iterdir() if path.suffix in (".jsonl", ".txt"))
        if not files:
            raise BadInput(f"{place} holds no *.jsonl and no *.txt.")
        return files
    if not place.is_file():
        raise BadInput(f"--calibration {place}: no such file or folder.")
    return [place]
