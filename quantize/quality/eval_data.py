"""What quality is measured with: questions and held-out text, found, looked through before any
work, and asked of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import sha256_of
from packhorse.quantize.quality.evaluate import prompt_of, read_questions, read_texts
from packhorse.quantize.settings import Settings
from torch import Tensor
from transformers import AutoTokenizer

PROOF_PROMPTS = 16


@dataclass(frozen=True)
class Yardstick:
    """What quality is measured with. A file that is not there is not measured, and the report says
    so.
    """

    eval_file: Path | None = None
    text_file: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Names and digests of the files, to know whether two reports used the same."""
        files = {"eval": self.eval_file, "text": self.text_file}
        return {
            kind: {"file": path.name, "sha256": sha256_of([path])}
            for kind, path in files.items()
            if path
        }


def find(folder: Path, settings: Settings) -> Yardstick:
    """The files named in the settings, or those that lie where a demo keeps them."""
    if not settings.quality:
        return Yardstick()
    beside = folder.absolute().parent / "eval"
    named = {"eval": settings.eval_file, "text": settings.text_file}
    usual = {"eval": beside / "general.jsonl", "text": beside / "held_out_text.jsonl"}
    for path in named.values():
        if path is not None and not path.is_file():
            raise BadInput(f"{path}: no such file.")
    chosen = {
        kind: named[kind] or (usual[kind] if usual[kind].is_file() else None) for kind in named
    }
    return Yardstick(chosen["eval"], chosen["text"])


def look_through(folder: Path, yardstick: Yardstick) -> None:
    """What is measured with must not turn out to be of no use after hours. Raises BadInput."""
    if not yardstick.eval_file and not yardstick.text_file:
        return
    tokenizer = tokenizer_of(folder)
    if yardstick.text_file:
        read_texts(yardstick.text_file, tokenizer)
    if yardstick.eval_file:
        for question in read_questions(yardstick.eval_file):
            prompt_of(question, tokenizer)


def prompts(folder: Path, yardstick: Yardstick, rows: Tensor | None) -> list[list[int]]:
    """What the load proof asks: the evaluation's questions, else its text, else calibration rows;
    nothing (so that verify takes random tokens) without any.
    """
    if not (yardstick.eval_file or yardstick.text_file):
        return [] if rows is None else [row.tolist() for row in rows[:PROOF_PROMPTS]]
    tokenizer = tokenizer_of(folder)
    if yardstick.eval_file:
        questions = read_questions(yardstick.eval_file)
        chosen = questions[:: max(1, len(questions) // PROOF_PROMPTS)][:PROOF_PROMPTS]
        return [prompt_of(question, tokenizer) for question in chosen]
    assert yardstick.text_file is not None
    return read_texts(yardstick.text_file, tokenizer)[:PROOF_PROMPTS]


def missing(yardstick: Yardstick, settings: Settings) -> list[str]:
    notes = []
    if settings.quality and not yardstick.text_file:
        notes.append("perplexity not measured: no --text file")
    if settings.quality and not yardstick.eval_file:
        notes.append("score not measured: no --eval file")
    return notes


def tokenizer_of(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{folder} has no tokenizer that loads, which measuring quality needs; add it, or pass "
            f"--no-quality: {error}"
        ) from error
