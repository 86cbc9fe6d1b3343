"""Texts from files and from datasets of the Hugging Face hub, and their token ids.

A text is plain, or a conversation that the model's own chat template renders. Used for calibration
(text.py) and for evaluation (quality/evaluate.py).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from packhorse.quantize.errors import BadInput

Message = dict[str, Any]
"""One message of a conversation, as chat templates take it: `role`, `content`, ..."""
HUB_ROWS = 10_000
"""Limit on the rows that are read from a hub dataset, from its first row on."""
HUB_CHARACTERS = 64
"""Limit on the characters that are read from a hub dataset, for each token wanted. A token needs
about four."""
_HUB_DATASET = re.compile(
    r"(?P<name>\w[\w.-]*(/[\w.-]+)?)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True)
class Text:
    """A plain text or a conversation, not tokenized yet. `where` names its source for errors."""

    content: str | list[Message]
    tools: list[dict[str, Any]] | None
    where: str

    @classmethod
    def of(cls, row: dict[str, Any], where: str) -> Text:
        """From a row with `messages` or `text`. Raises BadInput that names the row's columns."""
        for content, kind in ((row.get("messages"), list), (row.get("text"), str)):
            if isinstance(content, kind):
                return cls(content, row.get("tools"), where)
        columns = ", ".join(f"`{name}`" for name in row) or "nothing"
        raise BadInput(f"{where}: has {columns}, needs `messages` or `text`.")

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids; conversations are rendered with the chat template. Raises BadInput when the
        template refuses a conversation.
        """
        if isinstance(self.content, str):
            return list(tokenizer.encode(self.content))
        return render(tokenizer, self.content, self.tools, self.where)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    where: str,
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Token ids of a conversation by the chat template. Raises BadInput, which names `where`, when
    the template refuses it.
    """
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
        )
    except (ValueError, TypeError, KeyError, jinja2.TemplateError) as error:
        raise BadInput(
            f"{where}: the model's chat template does not take it ({error}); change the messages, "
            'or give plain {"text": ...} for calibration and perplexity.'
        ) from error
    return list(ids)


def read_utf8(path: Path) -> str:
    """Raises BadInput when the file cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and JSON objects; empty lines are skipped. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file.")
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(f"{path}, line {number}: not JSON ({error.msg}).") from error
            if not isinstance(row, dict):
                raise BadInput(
                    f"{path}, line {number}: a JSON object is needed, not {type(row).__name__}."
                )
            yield number, row


def read_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the texts in a JSON lines file. Raises BadInput."""
    return [text.tokens(tokenizer) for text in texts_of_json_lines(path)]


def texts_of_json_lines(path: Path) -> list[Text]:
    """From lines `{"messages": [...]}` or `{"text": "..."}`. Raises BadInput, also when the file
    holds no text.
    """
    texts = [Text.of(row, f"{path}, line {number}") for number, row in read_json_lines(path)]
    if not texts:
        raise BadInput(f"{path}: holds no text.")
    return texts


def texts_of_file(path: Path) -> list[Text]:
    """From a .txt file, one text per paragraph, or from JSON lines. Raises BadInput."""
    if path.suffix != ".txt":
        return texts_of_json_lines(path)
    paragraphs = read_utf8(path).split("\n\n")
    return [Text(part, None, str(path)) for part in paragraphs if part.strip()]


def text_files(place: Path) -> list[Path]:
    """The file itself, or the *.jsonl and *.txt files of a folder, sorted. Raises BadInput."""
    if place.is_dir():
        files = sorted(path for path in place.iterdir() if path.suffix in (".jsonl", ".txt"))
        if not files:
            raise BadInput(f"{place} holds no *.jsonl and no *.txt.")
        return files
    if not place.is_file():
        raise BadInput(f"--calibration {place}: no such file or folder.")
    return [place]


def hub_dataset(place: Path | str) -> dict[str, str] | None:
    """Name, config (where given) and split of a hub dataset; None when `place` exists on disk or
    looks like a file's name.
    """
    named = _HUB_DATASET.fullmatch(str(place))
    if named is None or Path(place).exists() or Path(place).suffix in (".jsonl", ".txt"):
        return None
    parts = {**named.groupdict(), "split": named["split"] or "train"}
    return {key: value for key, value in parts.items() if value}


def texts_of_hub_dataset(dataset: dict[str, str], max_tokens: int) -> list[Text]:
    """The dataset's first texts, as many as HUB_ROWS and HUB_CHARACTERS allow. The rows are
    streamed, so that no more than these is downloaded. Raises BadInput.
    """
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
        for number, row in enumerate(itertools.islice(rows, HUB_ROWS), start=1):
            text = Text.of(_without_none(row), f"{name}:{split}, row {number}")
            texts.append(text)
            characters += len(str(text.content))
            if characters >= max_tokens * HUB_CHARACTERS:
                break
    except BadInput:
        raise
    except Exception as error:  # of datasets, the hub's client, pyarrow or the network
        raise BadInput(
            f"--calibration {name}: no such file or folder, and no dataset that could be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    return texts


def _without_none(value: Any) -> Any:
    """Without keys whose value is None: a table gives every row all columns and every message all
    keys, and chat templates test whether a key is there.
    """
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_none(part) for part in value]
    return value
