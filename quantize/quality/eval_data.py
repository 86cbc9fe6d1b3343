"""Evaluation data: the files with questions and held-out text. They are found and checked before
any work, and give the prompts of the load check.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from packhorse.quantize.calibration.dataset import read_texts
from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import sha256_of
from packhorse.quantize.quality.evaluate import prompt_of, read_questions
from packhorse.quantize.settings import Settings

CHECK_PROMPTS = 16


@dataclass(frozen=True)
class EvalData:
    """The evaluation files. Without a file its figures are not measured, and the report says so."""

    eval_file: Path | None = None
    text_file: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Names and digests of the files, which tell whether two reports used the same."""
        files = {"eval": self.eval_file, "text": self.text_file}
        return {
            kind: {"file": path.name, "sha256": sha256_of([path])}
            for kind, path in files.items()
            if path
        }


def find(folder: Path, settings: Settings) -> EvalData:
    """The files that the settings name, or those in `../eval` seen from the model folder. Raises
    BadInput when a named file is missing.
    """
    if not settings.quality:
        return EvalData()
    beside = folder.absolute().parent / "eval"
    named = {"eval": settings.eval_file, "text": settings.text_file}
    usual = {"eval": beside / "general.jsonl", "text": beside / "held_out_text.jsonl"}
    for path in named.values():
        if path is not None and not path.is_file():
            raise BadInput(f"{path}: no such file.")
    chosen = {
        kind: named[kind] or (usual[kind] if usual[kind].is_file() else None) for kind in named
    }
    return EvalData(chosen["eval"], chosen["text"])


def check(folder: Path, eval_data: EvalData) -> None:
    """Read both files and render their texts, so that a mistake in them ends the run before hours
    of work. Raises BadInput.
    """
    if not eval_data.eval_file and not eval_data.text_file:
        return
    tokenizer = tokenizer_of(folder)
    if eval_data.text_file:
        read_texts(eval_data.text_file, tokenizer)
    if eval_data.eval_file:
        for question in read_questions(eval_data.eval_file):
            prompt_of(question, tokenizer)


def prompts(folder: Path, eval_data: EvalData, rows: Tensor | None) -> list[list[int]]:
    """The prompts of the load check as token ids: questions, or held-out text, or calibration rows.
    Without any of them an empty list, for which engine_check takes random tokens.
    """
    if not (eval_data.eval_file or eval_data.text_file):
        return [] if rows is None else [row.tolist() for row in rows[:CHECK_PROMPTS]]
    tokenizer = tokenizer_of(folder)
    if eval_data.eval_file:
        questions = read_questions(eval_data.eval_file)
        chosen = questions[:: max(1, len(questions) // CHECK_PROMPTS)][:CHECK_PROMPTS]
        return [prompt_of(question, tokenizer) for question in chosen]
    assert eval_data.text_file is not None
    return read_texts(eval_data.text_file, tokenizer)[:CHECK_PROMPTS]


def missing_notes(eval_data: EvalData, settings: Settings) -> list[str]:
    """Notes for the report on figures without a file."""
    notes = []
    if settings.quality and not eval_data.text_file:
        notes.append("perplexity not measured: no --text file")
    if settings.quality and not eval_data.eval_file:
        notes.append("score not measured: no --eval file")
    return notes


def tokenizer_of(folder: Path) -> Any:
    """Raises BadInput when the folder has no tokenizer that loads."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{folder} has no tokenizer that loads, which measuring quality needs; add it, or pass "
            f"--no-quality: {error}"
        ) from error
