"""Evaluation of a model: exact match on questions, perplexity on held-out text, and the comparison
of two models' answers in an engine.

Works on any causal language model of transformers, and does not depend on quantization. Called by
measure.py, engine_check.py, and the demo's score.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from packhorse.quantize.calibration.dataset import Message, read_json_lines, render
from packhorse.quantize.errors import BadInput

MAX_LENGTH = 2048
"""Tokens of a text that are used."""


@dataclass(frozen=True)
class Question:
    """One line of an evaluation file: chat messages, the one right answer, and its domain."""

    messages: list[Message]
    answer: str
    domain: str
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """Right answers, and all questions, by domain."""

    right: dict[str, int]
    total: dict[str, int]

    @property
    def accuracy(self) -> float:
        return sum(self.right.values()) / sum(self.total.values())

    def as_json(self) -> dict[str, Any]:
        by_domain = {
            name: round(self.right.get(name, 0) / count, 4)
            for name, count in sorted(self.total.items())
        }
        return {
            "exact_match": round(self.accuracy, 4),
            "questions": sum(self.total.values()),
            "by_domain": by_domain,
        }


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines `{"prompt", "answer", "domain"}`; `domain`, `history` and `tools`
    are optional.

    Raises BadInput with the file, the line and the missing key.
    """
    questions = []
    for number, row in read_json_lines(path):
        if missing := [name for name in ("prompt", "answer") if not isinstance(row.get(name), str)]:
            raise BadInput(
                f"{path}, line {number}: {' and '.join(missing)} must be there, as text."
            )
        messages = [*row.get("history", []), {"role": "user", "content": row["prompt"]}]
        questions.append(
            Question(messages, row["answer"], row.get("domain", "all"), row.get("tools", []))
        )
    if not questions:
        raise BadInput(f"{path}: holds no questions.")
    return questions


def visible(text: str) -> str:
    """The answer without a leading `<think>` part."""
    return text.rpartition("</think>")[2].strip()


def prompt_of(question: Question, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the question with the generation prompt."""
    where = f"the question {question.messages[-1]['content'][:40]!r}"
    return render(
        tokenizer, question.messages, question.tools or None, where, add_generation_prompt=True
    )


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The model's answers by greedy decoding, in the order of the questions. `advance` is called
    with the size of each finished batch.
    """
    prompts = [prompt_of(question, tokenizer) for question in questions]
    # Prompts of similar length share a batch, so that padding costs little.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in batch)
        ids = torch.tensor(
            [[pad] * (width - len(prompts[index])) + list(prompts[index]) for index in batch]
        )
        mask = torch.tensor(
            [[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in batch]
        )
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )
        for index, row in zip(batch, output, strict=True):
            answers[index] = visible(tokenizer.decode(row[width:], skip_special_tokens=True))
        advance(len(batch))
    return answers


def score(questions: list[Question], answers: list[str]) -> Score:
    """Exact match by domain."""
    right = Counter(
        q.domain for q, answer in zip(questions, answers, strict=True) if answer == q.answer
    )
    return Score(dict(right), dict(Counter(q.domain for q in questions)))


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    texts: list[list[int]],
    *,
    max_length: int = MAX_LENGTH,
    advance: Callable[[int], None] = lambda count: None,
) -> float:
    """exp of the mean negative log-likelihood over all tokens but the first of each text. Texts are
    cut at max_length. Raises BadInput when no text has two tokens.
    """
    total, count = 0.0, 0
    for ids in texts:
        row = torch.tensor([ids[:max_length]])
        if row.shape[1] > 1:
            logits = model(row, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum")
            total, count = total + loss.item(), count + row.shape[1] - 1
        advance(1)
    if not count:
        raise BadInput("The held-out text has no two tokens in a row; perplexity needs some.")
    return math.exp(total / count)


def count_predictions(texts: Sequence[Sequence[int]], *, max_length: int = MAX_LENGTH) -> int:
    """The number of predicted tokens over which `perplexity` takes the mean."""
    return sum(max(min(len(ids), max_length) - 1, 0) for ids in texts)


def compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare an engine's outputs for the same prompts with two checkpoints.

    `answers_equal` is a share of prompts. `answers_until_difference` is the mean share of an answer
    before its first differing token; `first_differences` are the positions of these tokens.
    Log-probabilities are natural, of every prompt token but the first.
    """
    positions: list[int] = []
    shares: list[float] = []
    differences: list[float] = []
    for one, other in zip(before, after, strict=True):
        a, b = one["answer"], other["answer"]
        same = next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )
        longer = max(len(a), len(b))
        shares.append(same / longer if longer else 1.0)
        if same < longer:
            positions.append(same)
        differences += apart(one["logprobs"], other["logprobs"])
    return {
        "prompts": len(shares),
        "answers_equal": round(1 - len(positions) / len(shares), 4),
        "answers_until_difference": round(sum(shares) / len(shares), 4),
        "first_differences": sorted(positions),
        **moved(differences),
    }


def apart(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """The absolute differences, position by position."""
    return [abs(x - y) for x, y in zip(one, other, strict=True)]


def moved(differences: Sequence[float]) -> dict[str, Any]:
    """Figures for the report from absolute differences of log-probabilities."""
    return {
        "prompt_tokens": len(differences),
        "logprob_difference_mean": round(sum(differences) / max(len(differences), 1), 5),
        "logprob_difference_max": round(max(differences, default=0.0), 5),
    }
