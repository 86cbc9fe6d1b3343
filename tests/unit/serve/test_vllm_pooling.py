"""What vLLM says of a pooling model, and its outputs. The engine itself is in tests/e2e."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.outputs import PoolingOutput, PoolingRequestOutput

from packhorse.serve.api.pooling import floats, rows
from packhorse.serve.engines.vllm.pooling import MANY_CHARS, Pools, _chunk, pooler_of
from packhorse.serve.errors import Invalid, Unavailable
from packhorse.serve.messages import Pooler
from tests.e2e.pooling_models import make_tokenizer


def llm(**fields: Any) -> Any:
    """As much of an engine as `pooler_of` looks at."""
    config = SimpleNamespace(
        runner_type="pooling",
        score_type="bi-encoder",
        architecture="BertModel",
        hf_config=SimpleNamespace(num_labels=2, id2label={0: "LABEL_0", 1: "LABEL_1"}),
    )
    for name, value in fields.items():
        setattr(config, name, value)
    return SimpleNamespace(model_config=config)


def labelled(*names: str) -> Any:
    return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)))


def test_what_a_model_can_do_is_in_its_configuration() -> None:
    assert pooler_of(llm(runner_type="generate")) is None
    assert pooler_of(llm(hf_config=labelled())) == Pooler("bi-encoder")
    cross = {"score_type": "cross-encoder"}
    assert pooler_of(llm(**cross, hf_config=labelled("x"))) == Pooler("cross-encoder", ("x",))
    assert pooler_of(llm(**cross, hf_config=labelled("a", "b"))) == Pooler(None, ("a", "b"))
    assert pooler_of(llm(architecture="JinaForRanking")) == Pooler(None, ("LABEL_0", "LABEL_1"))


def output(data: torch.Tensor, **fields: Any) -> Any:
    return PoolingRequestOutput("id", PoolingOutput(data), [1], 0, True, **fields)


def test_vectors_are_float32_row_by_row() -> None:
    one = _chunk(output(torch.tensor([1.5, -2.0], dtype=torch.float16)))
    assert one.finish_reason == "stop"
    assert one.vectors is not None
    assert (floats(one.vectors), one.vectors.rows) == ([1.5, -2.0], None)
    turned = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).T  # not contiguous
    several = _chunk(output(turned.bfloat16())).vectors
    assert several is not None
    assert rows(several) == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]


def test_what_is_no_number_is_not_sent() -> None:
    """JSON has no word for it, and a client would take it for a place among others."""
    with pytest.raises(Invalid, match="not a number"):
        _chunk(output(torch.tensor([1.0, float("nan")])))
    with pytest.raises(Unavailable, match="gave up"):
        _chunk(output(torch.tensor([1.0]), error=SimpleNamespace()))


async def test_the_rest_of_far_too_long_a_text_is_left_out_once(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    pools = object.__new__(Pools)
    pools._max_model_len = 10
    pools._longest = ("", "")
    pools._llm = SimpleNamespace(renderer=SimpleNamespace(get_tokenizer=lambda: tokenizer))
    short = "bread " * (MANY_CHARS * 10 // 6)
    assert await pools._bounded(short) == short
    for text in ("bread and cheese " * 1000, "nowordofthevocabulary " * 1000):
        cut, again = await asyncio.gather(pools._bounded(text), pools._bounded(text))
        assert cut == again
        kept = tokenizer(cut, add_special_tokens=False)["input_ids"]
        assert kept == tokenizer(text, add_special_tokens=False)["input_ids"][:11]
