"""Calibration text -> rows of token ids. Seeded, so that a run can be repeated; hashed, so that a
report says on what.

Text is rendered with the model's own chat template where it is a conversation, and packed end to
end into rows of one length: no padding, no half-used row. It comes from files here, or from a
dataset of the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import sha256_of
from packhorse.quantize.quality.evaluate import Text, read_utf8, texts_of
from torch import Tensor
from transformers import PreTrainedTokenizerBase

ENOUGH_TOKENS = 64 * 1024  # below this the statistics of a layer are noise
DATASET_ROWS = 10_000
"""Rows of a dataset that are looked at, from its beginning."""
DATASET_CHARACTERS = 64
"""And no more than this many characters for each token wanted; 16 times what is needed or so."""
_DATASET = re.compile(
    r"(?P<name>\w[\w.-]*(/[\w.-]+)?)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True)
class Calibration:
    """Token ids int64 (rows, row_tokens), and where they are from: files or a dataset."""

    rows: Tensor
    files: tuple[Path, ...] = ()
    dataset: dict[str, str] | None = None
    """Its name, config where one is named, and split."""

    @property
    def num_tokens(self) -> int:
        return self.rows.numel()

    @property
    def digest(self) -> str:
        """Of the rows: what the tokenizer made of the text."""
        return hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()

    def as_json(self) -> dict[str, object]:
        """With a digest of the files; for a dataset, which may change on the hub, of the rows."""
        if self.dataset is None:
            names: dict[str, object] = {"files": [path.name for path in self.files]}
            digest = sha256_of(list(self.files))
        else:
            names = {"dataset": self.dataset}
            digest = self.digest
        shape = {"tokens": self.num_tokens, "row_tokens": self.rows.shape[1]}
        return {**names, "sha256": digest, **shape}


def read(
    place: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    row_tokens: int,
    seed: int,
    force: bool = False,
) -> Calibration:
    """Rows from a file, from all *.jsonl and *.txt of a folder, or from the first rows of a dataset
    (`name`, `organisation/name`, `name@config:split`; the split is `train` where none is named).
    Texts are shuffled by `seed`, and tokenized until `max_tokens` are there.

    JSON lines and datasets hold `messages` or `text`; a .txt file is one text a paragraph. Raises
    BadInput when nothing is there, or less than ENOUGH_TOKENS unless `force`.
    """
    files: list[Path] = []
    if dataset := _dataset(place):
        texts = _of_dataset(dataset, max_tokens * DATASET_CHARACTERS)
    else:
        files = _files(Path(place))
        texts = [text for path in files for text in _of_file(path)]
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
    row_tokens = min(row_tokens, len(stream))
    if not row_tokens:
        raise BadInput(f"{place} holds no text.")
    count = len(stream) // row_tokens
    rows = torch.tensor(stream[: count * row_tokens]).reshape(count, row_tokens)
    return Calibration(rows, tuple(files), dataset)


def _dataset(place: Path | str) -> dict[str, str] | None:
    """What `place` names, when it is neither here nor called like a file."""
    named = _DATASET.fullmatch(str(place))
    if named is None or Path(place).exists() or Path(place).suffix in (".jsonl", ".txt"):
        return None
    parts = {**named.groupdict(), "split": named["split"] or "train"}
    return {key: value for key, value in parts.items() if value}


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        files = sorted(path for path in place.iterdir() if path.suffix in (".jsonl", ".txt"))
        if not files:
            raise BadInput(f"{place} holds no *.jsonl and no *.txt.")
        return files
    if not place.is_file():
        raise BadInput(f"--calibration {place}: no such file or folder.")
    return [place]


def _of_file(path: Path) -> list[Text]:
    if path.suffix != ".txt":
        return texts_of(path)
    paragraphs = read_utf8(path).split("\n\n")
    return [Text(part, None, str(path)) for part in paragraphs if part.strip()]


def _of_dataset(dataset: dict[str, str], max_characters: int) -> list[Text]:
    """The first texts of a dataset, streamed, so that no more of it is downloaded than that."""
    name, split = dataset["name"], dataset["split"]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BadInput(
            f"--calibration {name}: no such file or folder. If it is a dataset of the Hugging Face "
            "hub, reading it needs: pip install 'packhorse[hub-data]'."
        ) from error
    texts: list[Text] = []
    characters = 0
    try:
        rows = load_dataset(name, dataset.get("config"), split=split, streaming=True)
        for number, row in enumerate(itertools.islice(rows, DATASET_ROWS), start=1):
            text = Text.of(_without_none(row), f"{name}:{split}, row {number}")
            texts.append(text)
            characters += len(str(text.content))
            if characters >= max_characters:
                break
    except BadInput:
        raise
    except Exception as error:  # of datasets, the hub's client, pyarrow, the network
        raise BadInput(
            f"--calibration {name}: no such file or folder, and no dataset that could be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    return texts


def _without_none(value: Any) -> Any:
    """A table gives every row all columns, and every message all keys; templates ask whether they
    are there.
    """
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_none(part) for part in value]
    return value
