"""Tensors that nothing would use, or that fit no layer, are refused with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from packhorse.serve.adapters.formats import check
from packhorse.serve.errors import Invalid
from tests.unit.serve.adapter_makers import A0, B0, LIMITS, made, renamed


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensors"),
        ({A0: torch.ones(4, 128)}, "q_proj has lora_A and no lora_B: the file is incomplete"),
        ({B0: torch.ones(128, 4)}, "q_proj has lora_B and no lora_A"),
        (renamed(a=A0.replace("A.weight", "A.default.weight")), "an adapter's name in it"),
        (renamed(a=A0.removeprefix("base_model.model.")), "does not begin with base_model.model."),
        (renamed(a=A0.replace(".weight", "")), "nothing would use it"),
        (renamed(**{A0.replace("lora_A.weight", "lora_E"): torch.ones(4, 1)}), "is AdaLoRA's"),
        (renamed(**{f"{A0}\n": torch.ones(1)}), r"weight\\n' is not a lora_A or lora_B"),
        (renamed(**{f"base_model.model.{'x' * 9999}": torch.ones(1)}), "xxx\\.\\.\\. is not a"),
        (renamed(**{A0.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(1)}), "DoRA"),
        (renamed(**{B0.replace("weight", "bias"): torch.ones(1)}), "is a bias.*bias='none'"),
        (renamed(**{"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(1)}),
         "adapts the embeddings.*merge_and_unload"),
        (renamed(**{"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(1)}),
         "vocabulary.*save_embedding_layers=False"),
        (renamed(**{"base_model.model.lm_head.weight": torch.ones(1)}), "replaces the output"),
        (renamed(**{"base_model.model.x.ia3_l": torch.ones(1)}), "IA3"),
        (renamed(**{"prompt_embeddings": torch.ones(1)}), "prompt tuning"),
        (renamed(a="base_model.model.lm_head.lora_A.weight"), "'lm_head', and embeddings"),
        ({A0: torch.ones(4, 512), B0: torch.ones(128, 4)},
         r"shape \[4, 512\], and \[4, 128\] fits.*trained for a base with hidden size 512\?"),
        ({A0: torch.ones(4, 128), B0: torch.ones(512, 4)},
         r"shape \[512, 4\], and \[128, 4\] fits.*base with 512 outputs there\?"),
        ({A0: torch.ones(4, 128), B0: torch.ones(128, 5)}, r"\[128, 5\], and \[128, 4\] fits"),
        ({A0: torch.ones(128), B0: torch.ones(128, 4)}, r"shape \[128\]"),
        ({A0: torch.tensor(1.0), B0: torch.ones(128, 4)}, r"shape \[\]"),
        ({A0: torch.ones(0, 128), B0: torch.ones(128, 0)}, "has rank 0 in .* and 4 in"),
        ({A0: torch.ones(4, 128, dtype=torch.float64), B0: torch.ones(128, 4)},
         "type 'F64', and F32, F16, BF16 are served"),
        ({A0: torch.ones(4, 128, dtype=torch.int8), B0: torch.ones(128, 4)}, "type 'I8'"),
        ({name.replace("layers.0", f"layers.{layer}"): torch.ones(4, 128)
          for layer in (30, 31) for name in (A0, B0)},
         r"no layer 'model.layers.30.self_attn.q_proj' \(and 1 others\): layers of that name and"),
        ({name.replace("layers.0", "layers.30"): torch.ones(4, 4096) for name in (A0, B0)},
         "its q_proj layers have the sizes 128, the tensor \\[4, 4096\\].*another base model"),
        ({name.replace("q_proj", "query_key_value"): torch.ones(4, 4) for name in (A0, B0)},
         "no layer of it is called 'query_key_value'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_tensors_that_do_not_fit(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(Invalid, match=message) as caught:
        check(made(tmp_path / "source", tensors), LIMITS)
    assert len(caught.value.message) < 700
