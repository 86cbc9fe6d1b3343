"""Evaluation files: what is read, what is refused, what counts as right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.quantize.errors import BadInput
from packhorse.quantize.quality.evaluate import Question, perplexity, read_questions, score, visible


def test_the_thinking_part_is_not_the_answer() -> None:
    assert visible("<think>\n1 + 1 = 2\n</think>\n\n2.") == "2."
    assert visible(" plain ") == "plain"


def test_score_counts_exact_matches_by_domain() -> None:
    questions = [Question([], "a", "x"), Question([], "b", "x"), Question([], "c", "y")]
    result = score(questions, ["a", "B", "c"])
    assert result.as_json() == {
        "exact_match": 0.6667, "questions": 3, "by_domain": {"x": 0.5, "y": 1.0}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "object is needed"),
        ('{"prompt": "a"}', "answer must be"),
        ("", "no questions"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_questions(path)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert math.isclose(perplexity(model, [[1, 2, 3], [4, 5]]), 50, rel_tol=1e-4)
