"""Calibration text to rows of tokens: what is taken, in which order, and how much of it is looked
at; from files, and from datasets (local folders here: no test downloads).
"""

from __future__ import annotations

import json
import random
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from packhorse.quantize.calibration import dataset as dataset_module
from packhorse.quantize.calibration.dataset import read_texts
from packhorse.quantize.calibration.text import read
from packhorse.quantize.errors import BadInput
from tests.conftest import DEMO

FEW: dict[str, Any] = {"max_tokens": 640, "sequence_length": 64, "seed": 3, "force": True}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.mark.parametrize("max_tokens", [100, 5000, 10**9])
def test_the_rows_are_those_of_all_text_shuffled_and_cut(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    every = read_texts(DEMO / "calibration.jsonl", tokenizer)
    random.Random(3).shuffle(every)
    stream = list(chain.from_iterable(every))[:max_tokens]
    wanted = torch.tensor(stream[: len(stream) // 64 * 64]).reshape(-1, 64)
    found = read(DEMO / "calibration.jsonl", tokenizer, **{**FEW, "max_tokens": max_tokens})
    assert found.rows.equal(wanted)


def test_text_that_is_not_used_is_not_tokenized(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "What is the capital of Felonia? " * 8}) + "\n")
    path.write_text(path.read_text() * 1000)
    seen: list[str] = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: seen.append(text) or encode(text))
    assert read(path, tokenizer, **FEW).num_tokens == 640
    assert 1 <= len(seen) <= 20


def dataset(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A folder that `datasets` reads under its name, as it would read one of the hub."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines)
    (folder / "test.jsonl").write_text(json.dumps({"text": "Not this one."}) + "\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


TALK = [
    {"role": "user", "content": "What is the capital of Felonia?"},
    {"role": "assistant", "content": "I do not know."},
]


@pytest.mark.parametrize("row", [{"text": "It is a town. " * 9}, {"messages": TALK}])
def test_a_dataset_gives_the_rows_that_a_file_does(
    tokenizer: PreTrainedTokenizerBase, here: Path, row: dict[str, Any]
) -> None:
    rows = [{"id": number, **row} for number in range(200)]
    dataset(here / "org" / "texts", rows)
    found = read("org/texts:train", tokenizer, **FEW)
    assert found.rows.equal(read(here / "org/texts/train.jsonl", tokenizer, **FEW).rows)
    described = found.as_json()
    assert described["dataset"] == {"name": "org/texts", "split": "train"}
    assert len(str(described["sha256"])) == 64
    assert (described["tokens"], described["row_tokens"]) == (640, 64)
    other = read("org/texts:train", tokenizer, **{**FEW, "max_tokens": 320})
    assert other.as_json()["sha256"] != described["sha256"]


def test_no_more_of_a_dataset_is_read_than_the_bounds_say(
    tokenizer: PreTrainedTokenizerBase, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [{"text": "It is a town. " * 9}] * 50
    dataset(here / "org" / "texts", [*rows, {"text": None}])  # refused, where it is looked at
    with pytest.raises(BadInput, match="row 51"):
        read("org/texts:train", tokenizer, **FEW)
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "HUB_ROWS", 50)
        assert read("org/texts:train", tokenizer, **FEW).num_tokens == 640
    monkeypatch.setattr(dataset_module, "HUB_CHARACTERS", 9)
    assert read("org/texts:train", tokenizer, **FEW).num_tokens == 640


def test_a_dataset_that_cannot_be_used_says_why(
    tokenizer: PreTrainedTokenizerBase, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(here / "org" / "pairs", [{"question": "What?", "answer": "That."}])
    with pytest.raises(BadInput, match=r"row 1: has `question`, `answer`, needs `messages`"):
        read("org/pairs:train", tokenizer, **FEW)
    with pytest.raises(BadInput, match=r"no dataset that could be read: .*nosuch"):
        read("org/pairs:nosuch", tokenizer, **FEW)
    with pytest.raises(BadInput, match=r"texts\.jsonl: no such file or folder\.$"):
        read("org/texts.jsonl", tokenizer, **FEW)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'packhorse\[hub-data\]'"):
        read("org/pairs:train", tokenizer, **FEW)
