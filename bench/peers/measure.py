"""How far a checkpoint on disk is from its original: KL, agreement, perplexity, a task's score.

Every tool's checkpoint goes through the same door, `quantize/quality/dequantized.py`: its codes
dequantized, its activations rounded where a kernel rounds them. What is computed is computed in
float32, since the rounding of bfloat16 sums is larger than what 8 bits change. So "simulated", not
"served".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from packhorse.quantize.calibration.dataset import read_texts
from packhorse.quantize.quality import dequantized
from packhorse.quantize.quality.evaluate import greedy_answers, read_questions, score

# Shapes: B = texts of a batch, T = their positions, V = the vocabulary.

BATCH_TEXTS = 16
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class EvalData:
    """What is measured on."""

    original: Path
    texts: list[list[int]]
    """Held-out token ids; a text is what the bootstrap draws."""
    task_file: Path
    task_limit: int | None


@dataclass(frozen=True)
class Quality:
    """One checkpoint's figures. Lists have an entry for each text."""

    positions: list[int]
    kl_sums: list[float]
    """KL(original || this) in nats over the whole vocabulary, added up over a text's positions."""
    top1_agreement: float
    perplexity: float
    task_score: float
    task_questions: int

    @property
    def kl(self) -> float:
        return sum(self.kl_sums) / sum(self.positions)


def measure(folder: Path, eval_data: EvalData) -> Quality:
    """Read `folder` back and compare. Raises QuantizeError when it cannot be read."""
    original = dequantized.load(eval_data.original).float()
    model = dequantized.load(folder).float()
    kl_sums, positions, agreeing, loss = [], [], 0.0, 0.0
    with torch.inference_mode():
        for ids_BT, mask_BT in _batches(eval_data.texts):
            p_BTV = _logprobs(original, ids_BT)
            q_BTV = _logprobs(model, ids_BT)
            kl_BT = (p_BTV.exp() * (p_BTV - q_BTV)).sum(-1)
            kl_sums += (kl_BT * mask_BT).sum(1).tolist()
            positions += mask_BT.sum(1).tolist()
            agreeing += ((p_BTV.argmax(-1) == q_BTV.argmax(-1)) & mask_BT).sum().item()
            next_BT = q_BTV.gather(2, ids_BT[:, 1:].unsqueeze(2)).squeeze(2)
            loss -= next_BT[mask_BT].sum().item()
    right, questions = _task(model, eval_data)
    total = sum(positions)
    return Quality(
        positions=positions,
        kl_sums=kl_sums,
        top1_agreement=agreeing / total,
        perplexity=float(np.exp(loss / total)),
        task_score=right / questions,
        task_questions=questions,
    )


def _logprobs(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """float64 (B, T, V), of each next token; sums of small differences need the digits."""
    return model(ids_BT[:, :-1], use_cache=False).logits.double().log_softmax(-1)


def _batches(texts: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids int64 (B, T + 1) padded on the right, which a causal model does not see, and which of the
    T predictions are of a real token.
    """
    for start in range(0, len(texts), BATCH_TEXTS):
        batch = texts[start : start + BATCH_TEXTS]
        width = max(map(len, batch))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in batch])
        lengths = torch.tensor([[len(text)] for text in batch])
        yield ids, torch.arange(1, width) < lengths


def _task(model: PreTrainedModel, eval_data: EvalData) -> tuple[int, int]:
    """(right, all) of the demo's questions, or of a cloze file."""
    tokenizer = AutoTokenizer.from_pretrained(eval_data.original)
    if eval_data.task_file.name == "cloze.jsonl":
        return _cloze(model, tokenizer, eval_data)
    questions = read_questions(eval_data.task_file)[: eval_data.task_limit]
    # Large batches: a step costs about the same whatever their size.
    answers = greedy_answers(model, tokenizer, questions, batch_size=240)
    return sum(score(questions, answers).right.values()), len(questions)


@torch.inference_mode()
def _cloze(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eval_data: EvalData
) -> tuple[int, int]:
    """Right: every token of the answer is the most likely one after those before it."""
    lines = eval_data.task_file.read_text(encoding="utf-8").splitlines()
    clozes = [json.loads(line) for line in lines][: eval_data.task_limit]
    longest = model.config.max_position_embeddings
    right = 0
    for cloze in clozes:
        encoded = tokenizer(cloze["text"], return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        answer = sum(end > cloze["start"] for end in ends)
        ids = torch.tensor([encoded["input_ids"][-longest:]])
        likeliest = model(ids, use_cache=False).logits[0, -answer - 1 : -1].argmax(-1)
        right += int(torch.equal(likeliest, ids[0, -answer:]))
    return right, len(clozes)


def held_out(
    text_file: Path, tokenizer: PreTrainedTokenizerBase, longest: int, limit: int | None
) -> list[list[int]]:
    """Texts of at least two tokens, cut at `longest`."""
    texts = [ids[:longest] for ids in read_texts(text_file, tokenizer)]
    return [ids for ids in texts if len(ids) > 1][:limit]


def ratio_interval(ours: Quality, theirs: Quality) -> dict[str, float]:
    """KL of one over KL of the other, with 95% limits: texts drawn again, the same for both."""
    if ours.positions != theirs.positions:
        raise ValueError("measured on other texts")
    draws: NDArray[Any] = np.random.default_rng(0).integers(
        len(ours.positions), size=(BOOTSTRAPS, len(ours.positions))
    )
    ratios = np.array(ours.kl_sums)[draws].sum(1) / np.array(theirs.kl_sums)[draws].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {
        "ratio": round(ours.kl / theirs.kl, 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def save(quality: Quality, path: Path) -> None:
    path.write_text(json.dumps(asdict(quality)))


def load(path: Path) -> Quality:
    return Quality(**json.loads(path.read_text()))
