"""Measure a checkpoint: score, perplexity, and the divergence of its predictions from the
original's.

Simulated with transformers from the files on disk (dequantized.py). Called by run.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from packhorse.quantize.calibration.dataset import read_texts
from packhorse.quantize.quality import dequantized, divergence
from packhorse.quantize.quality.eval_data import EvalData, tokenizer_of
from packhorse.quantize.quality.evaluate import (
    count_predictions,
    greedy_answers,
    perplexity,
    read_questions,
    score,
)
from packhorse.quantize.settings import Progress


def measure(folder: Path, eval_data: EvalData, stage: str, progress: Progress) -> dict[str, Any]:
    """Score and perplexity of a checkpoint, each where there is a file for it. `stage` is part of
    the progress labels.
    """
    if not eval_data.eval_file and not eval_data.text_file:
        return {}
    tokenizer = tokenizer_of(folder)
    model: PreTrainedModel = dequantized.load(folder)
    figures: dict[str, Any] = {}
    if eval_data.text_file:
        texts = read_texts(eval_data.text_file, tokenizer)
        figures["predictions"] = count_predictions(texts)
        figures["perplexity"] = round(
            perplexity(model, texts, advance=progress(f"perplexity {stage}", len(texts))), 4
        )
    if eval_data.eval_file:
        questions = read_questions(eval_data.eval_file)
        answers = greedy_answers(
            model, tokenizer, questions, advance=progress(f"score {stage}", len(questions))
        )
        figures["score"] = score(questions, answers).as_json()
    return figures


def measure_divergence(
    original: Path, quantized: Path, eval_data: EvalData, progress: Progress
) -> dict[str, Any] | None:
    """The divergence of `quantized` from the original on the held-out text; None without a text
    file. {"left_out": why} when both models do not fit in memory.
    """
    if not eval_data.text_file:
        return None
    texts = read_texts(eval_data.text_file, tokenizer_of(original))
    advance = progress("comparing predictions", len(texts))
    return divergence.between(original, quantized, texts, advance=advance)
