"""What a checkpoint knows, as figures: exact match on questions, perplexity on held-out text, and
how far two are apart.

Works on any causal language model of transformers; knows nothing of quantization. Called by
`report.py` before and after, by `verify.py`, and by the demo's `score.py`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
from packhorse.quantize.errors import BadInput
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, Any]
MAX_LENGTH = 2048
"""Tokens of a text that are looked at."""


@dataclass(frozen=True)
class Question:
    """One line of an evaluation file: what is asked (chat messages), the one right answer, and its
    domain.
    """

    messages: list[Message]
    answer: str
    domain: str
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """Right answers of all, by domain."""

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


def read_utf8(path: Path) -> str:
    """Raises BadInput for a file in another encoding, or that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines `{"prompt", "answer", "domain"}`; `history` and `tools` are
    optional.

    Raises BadInput with the file, the line and what is missing.
    """
    questions = []
    for number, row in _lines(path):
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


@dataclass(frozen=True)
class Text:
    """A text that is not tokenized yet, or a conversation, and where it is from."""

    content: str | list[Message]
    tools: list[dict[str, Any]] | None
    where: str

    @classmethod
    def of(cls, row: dict[str, Any], where: str) -> Text:
        """From a row with `messages` or `text`. Raises BadInput, with the columns there are."""
        for content, kind in ((row.get("messages"), list), (row.get("text"), str)):
            if isinstance(content, kind):
                return cls(content, row.get("tools"), where)
        columns = ", ".join(f"`{name}`" for name in row) or "nothing"
        raise BadInput(f"{where}: has {columns}, needs `messages` or `text`.")

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Conversations are rendered with the chat template. Raises BadInput when it refuses."""
        if isinstance(self.content, str):
            return list(tokenizer.encode(self.content))
        return _rendered(tokenizer, self.content, self.tools, self.where)


def texts_of(path: Path) -> list[Text]:
    """JSON lines `{"messages": [...]}` or `{"text": "..."}`."""
    texts = [Text.of(row, f"{path}, line {number}") for number, row in _lines(path)]
    if not texts:
        raise BadInput(f"{path}: holds no text.")
    return texts


def read_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of `texts_of`."""
    return [text.tokens(tokenizer) for text in texts_of(path)]


def visible(text: str) -> str:
    """The answer as a reader sees it: without a leading `<think>` part."""
    return text.rpartition("</think>")[2].strip()


def prompt_of(question: Question, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the question, up to where the answer begins."""
    where = f"the question {question.messages[-1]['content'][:40]!r}"
    return _rendered(
        tokenizer, question.messages, question.tools or None, where, add_generation_prompt=True
    )


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    where: str,
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Token ids by the chat template. Raises BadInput, naming `where`, when it refuses."""
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
    """What the model answers with temperature 0, in the order of the questions. `advance` is told
    of each batch.
    """
    prompts = [prompt_of(question, tokenizer) for question in questions]
    # Prompts of like length share a batch, so that padding costs little.
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
    """exp of the mean negative log-likelihood over all tokens but the first of each text, cut at
    max_length.
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
    """How many next tokens `perplexity` is about."""
    return sum(max(min(len(ids), max_length) - 1, 0) for ids in texts)


def compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What an engine made of the same prompts with two checkpoints.

    Shares are of prompts. `answers_until_difference` is the mean share of an answer that comes
    before the first token that differs; `first_differences` are those positions, where there is
    one. Log-probabilities are natural, of every prompt token but the first.
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
    """Position by position, without sign."""
    return [abs(x - y) for x, y in zip(one, other, strict=True)]


def moved(differences: Sequence[float]) -> dict[str, Any]:
    """Differences of log-probabilities, as a report has them."""
    return {
        "prompt_tokens": len(differences),
        "logprob_difference_mean": round(sum(differences) / max(len(differences), 1), 5),
        "logprob_difference_max": round(max(differences, default=0.0), 5),
    }
