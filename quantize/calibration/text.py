"""Calibration text as rows of token ids: found, shuffled with a seed, packed, and hashed.

Texts are packed end to end into rows of one length, without padding. The digests in the report name
the text of a run. Called by run.py.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from packhorse.quantize.calibration.dataset import (
    hub_dataset,
    text_files,
    texts_of_file,
    texts_of_hub_dataset,
)
from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import sha256_of

ENOUGH_TOKENS = 64 * 1024
"""With fewer calibration tokens, the statistics of a layer are noise."""


@dataclass(frozen=True)
class Calibration:
    """Token ids, int64 (rows, sequence length), and their source: files or a hub dataset."""

    rows: Tensor
    files: tuple[Path, ...] = ()
    dataset: dict[str, str] | None = None
    """Name, config (where given) and split."""

    @property
    def num_tokens(self) -> int:
        return self.rows.numel()

    @property
    def digest(self) -> str:
        """sha256 of the token ids."""
        return hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()

    def as_json(self) -> dict[str, object]:
        """For the report. `sha256` is that of the files; for a dataset, which may change on the
        hub, that of the token ids.
        """
        if self.dataset is None:
            names: dict[str, object] = {"files": [path.name for path in self.files]}
            digest = sha256_of(list(self.files))
        else:
            names = {"dataset": self.dataset}
            digest = self.digest
        shape = {"tokens": self.num_tokens, "row_tokens": self.rows.shape[1]}
        return {**names, "sha256": digest, **shape}


def find(folder: Path, named: Path | str | None) -> Path | str | None:
    """The named place, or `../calibration.jsonl` seen from the model folder; None when neither is
    there.
    """
    beside = folder.absolute().parent / "calibration.jsonl"
    return named or (beside if beside.is_file() else None)


def tokenizer_for(folder: Path) -> PreTrainedTokenizerBase:
    """Raises BadInput when the model folder has no tokenizer that loads."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{folder} has no tokenizer that loads, which calibration needs: {error}"
        ) from error
    return tokenizer


def read(
    place: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    sequence_length: int,
    seed: int,
    force: bool = False,
) -> Calibration:
    """Rows of `sequence_length` tokens from a file, from the *.jsonl and *.txt files of a folder,
    or from the first rows of a hub dataset: `name`, `organisation/name` or `name@config:split`; the
    default split is `train`.

    JSON lines and datasets hold `messages` or `text`; a .txt file holds one text per paragraph. The
    texts are shuffled with `seed`, and tokenized until `max_tokens` are there. Raises BadInput for
    no text, or for fewer tokens than ENOUGH_TOKENS without `force`.
    """
    files: list[Path] = []
    if dataset := hub_dataset(place):
        texts = texts_of_hub_dataset(dataset, max_tokens)
    else:
        files = text_files(Path(place))
        texts = [text for path in files for text in texts_of_file(path)]
    random.Random(seed).shuffle(texts)
    tokens = itertools.chain.from_iterable(text.tokens(tokenizer) for text in texts)
    stream = list(itertools.islice(tokens, max_tokens))
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
    sequence_length = min(sequence_length, len(stream))
    if not sequence_length:
        raise BadInput(f"{place} holds no text.")
    count = len(stream) // sequence_length
    rows = torch.tensor(stream[: count * sequence_length]).reshape(count, sequence_length)
    return Calibration(rows, tuple(files), dataset)


def refuse_evaluation_text(text: Calibration, evaluation_digests: Collection[str]) -> None:
    """Raises BadInput when a calibration file is also an evaluation file, by its sha256."""
    for path in text.files:
        if sha256_of([path]) in evaluation_digests:
            raise BadInput(
                f"{path} is also what quality is measured with, so the report would "
                "flatter; calibrate on other text, or pass --force."
            )
