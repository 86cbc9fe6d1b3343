"""Fine-tuned folders that PEFT made: what is taken computes what PEFT computes, and what the engine
cannot do is refused with the way out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from packhorse.serve.adapters.base_layers import linear_layers
from packhorse.serve.adapters.formats import AdapterLimits, check
from packhorse.serve.errors import Invalid
from tests.conftest import DEMO
from tests.unit.serve.adapter_makers import (
    CONFIG,
    LIMITS,
    LINEARS,
    Q0,
    TOKENS,
    WEIGHTS,
    adalora,
    copied,
    deltas,
    edit,
    logits,
    lora,
    made,
    save,
    tiny_base,
    wrapped,
)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({}, 4),
        ({"use_rslora": True}, 4),
        ({"rank_pattern": {"down_proj": 9, r"layers\.1\..*_proj": 2}}, 9),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.self_attn.q_proj": 3}}, 4),
        ({"rank_pattern": {".*_proj": 3}, "r": 64}, 3),
        ({"use_rslora": True, "alpha_pattern": {"layers.(0|1).mlp.down_proj": 5}}, 4),
        ({"init_lora_weights": "orthogonal"}, 4),
        ({"target_modules": "all-linear"}, 4),
        ({"target_modules": r".*layers\.[02]\..*up_proj"}, 4),
        ({"bias": "none", "lora_dropout": 0.5, "task_type": "CAUSAL_LM"}, 4),
    ],
    ids=str,
)
def test_a_lora_is_copied_and_computes_the_same(
    tmp_path: Path, settings: dict[str, Any], rank: int
) -> None:
    source = lora(tmp_path / "source", **settings)
    checked = check(source, LIMITS)
    assert (checked.kind, checked.rank) == ("lora", rank)
    folder, digest, written_rank = copied(source, LIMITS, tmp_path / "copy")
    assert written_rank == rank
    assert (folder / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    before, after = deltas(tiny_base(), source), deltas(tiny_base(), folder)
    assert before.keys() == after.keys()
    for module, delta in before.items():
        # The same operations on the same numbers.
        torch.testing.assert_close(after[module], delta, rtol=0, atol=0)
    content = (folder / WEIGHTS).read_bytes() + (folder / CONFIG).read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prune", [True, False])
def test_adalora_becomes_a_lora_that_computes_the_same(
    tmp_path: Path, prune: bool, dtype: torch.dtype
) -> None:
    source = adalora(tmp_path / "source", prune=prune, dtype=dtype)
    checked = check(source, LIMITS)
    assert checked.kind == "adalora"
    folder, _, rank = copied(source, LIMITS, tmp_path / "copy")
    assert rank == checked.rank <= 6
    if prune:
        masks = json.loads((source / CONFIG).read_text())["rank_pattern"].values()
        assert rank == max(map(sum, masks))
        assert min(map(sum, masks)) == 0  # modules that were pruned away are met too
    before, after = deltas(tiny_base(), source), deltas(tiny_base(), folder)
    for module, delta in before.items():
        changed = after.get(module, torch.zeros_like(delta))
        torch.testing.assert_close(changed, delta, rtol=1e-5, atol=1e-5)
    assert after.keys() <= before.keys()
    torch.testing.assert_close(
        logits(tiny_base(), folder), logits(tiny_base(), source), rtol=0, atol=1e-4
    )
    with torch.no_grad():
        assert (logits(tiny_base(), source) - tiny_base()(TOKENS).logits).abs().max() > 1e-3


def test_adalora_whose_pruned_ranks_are_still_in_the_file(tmp_path: Path) -> None:
    source = made(
        tmp_path / "whole",
        {
            f"base_model.model.{Q0}.lora_A": torch.randn(3, 128),
            f"base_model.model.{Q0}.lora_B": torch.randn(128, 3),
            f"base_model.model.{Q0}.lora_E": torch.tensor([[2.0], [3.0], [5.0]]),
        },
        peft_type="ADALORA", init_r=3, total_step=1,
        rank_pattern={f"{Q0}.lora_E.default": [True, False, True]},
    )  # fmt: skip
    tensors = load_file(source / WEIGHTS)
    folder, _, rank = copied(source, LIMITS, tmp_path / "copy")
    a_RI, b_OR, e_R1 = (tensors[f"base_model.model.{Q0}.lora_{part}"] for part in "ABE")
    e_R1[1] = 0
    expected_OI = b_OR @ (a_RI * e_R1) * 8 / (3 + 1e-5)
    assert rank == 2
    torch.testing.assert_close(deltas(tiny_base(), folder)[Q0], expected_OI, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clinic", "ledger-adalora", "code-qlora"])
def test_the_demo_adapters(tmp_path: Path, name: str) -> None:
    source = DEMO / "adapters" / name
    demo_limits = AdapterLimits(16, linear_layers(DEMO / "model"), 2**24)
    folder, _, rank = copied(source, demo_limits, tmp_path / "copy")
    assert rank == (12 if name == "ledger-adalora" else 8)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    before, after = deltas(model, source), deltas(model, folder)
    assert before.keys() == after.keys()
    for module, delta in before.items():
        torch.testing.assert_close(after[module], delta, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, folder), logits(model, source), rtol=0, atol=1e-4)


def test_configs_that_mean_the_same_have_one_digest(tmp_path: Path) -> None:
    source = lora(tmp_path / "source")
    _, digest, _ = copied(source, LIMITS, tmp_path / "first")
    edit(source, target_modules=["down_proj", "q_proj"], base_model_name_or_path="elsewhere",
         lora_alpha=6.0, rank_pattern={"up_proj": 7}, lora_dropout=0.5, revision="main",
         peft_version="0.0")  # fmt: skip
    assert copied(source, LIMITS, tmp_path / "other words")[1] == digest
    edit(source, r=2, lora_alpha=1, rank_pattern={"q_proj": 4, ".*": 4}, alpha_pattern={".*": 6})
    assert copied(source, LIMITS, tmp_path / "second")[1] == digest
    edit(source, alpha_pattern={"q_proj": 5, ".*": 6})
    assert copied(source, LIMITS, tmp_path / "third")[1] != digest


def test_a_module_keeps_its_rank_beside_one_whose_name_ends_alike(tmp_path: Path) -> None:
    tensors, layers = {}, {}
    for module, rank in (("layers.0.q", 2), ("model.layers.0.q", 3), ("model.layers.0.k", 3)):
        layers[module] = (8, 8)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(rank, 8)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(8, rank)
    patterns = {"model.layers.0.[qk]": 3, "layers.0.q": 2}
    source = made(tmp_path / "source", tensors, rank_pattern=patterns)
    limits = AdapterLimits(8, layers, 2**20)
    folder, digest, _ = copied(source, limits, tmp_path / "first")
    assert copied(folder, limits, tmp_path / "again")[1] == digest


def test_a_copy_is_read_only_and_a_copy_of_it_is_the_same(tmp_path: Path) -> None:
    folder, digest, rank = copied(adalora(tmp_path / "source"), LIMITS, tmp_path / "copy")
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        CONFIG: 0o444, WEIGHTS: 0o444,
    }  # fmt: skip
    assert copied(folder, LIMITS, tmp_path / "again")[1:] == (digest, rank)


def test_what_is_beside_an_adapter_does_not_matter(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    (source / "README.md").write_text("x")
    (source / "runs").mkdir()
    (source / "runs" / "latest").symlink_to("../README.md")
    (source / "adapter_model.bin").write_bytes(b"never opened")
    assert check(source, LIMITS).rank == 4


@pytest.mark.parametrize("kind", ["patterns", "rslora", "adalora"])
def test_vllm_reads_the_same_out_of_a_copy(tmp_path: Path, kind: str) -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    if kind == "adalora":
        source = adalora(tmp_path / "source")
    else:
        source = lora(
            tmp_path / "source", use_rslora=kind == "rslora",
            rank_pattern={"down_proj": 9, r"layers\.1\..*_proj": 2}, alpha_pattern={"[12].*": 3},
        )  # fmt: skip
    folder, _, rank = copied(source, LIMITS, tmp_path / "copy")
    helper = PEFTHelper.from_local_dir(str(folder), None)
    model = LoRAModel.from_local_checkpoint(
        str(folder), set(LINEARS), helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    assert max([helper.r, *helper.rank_pattern.values()]) == rank
    assert not helper._validate_features()
    expected = {name: delta for name, delta in deltas(tiny_base(), source).items() if delta.any()}
    assert model.loras.keys() == expected.keys()
    for name, weights in model.loras.items():
        delta = weights.lora_b @ weights.lora_a * weights.scaling
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (LoraConfig, {"use_dora": True}, "use_dora=True.*DoRA.*merge_and_unload.*quantize model"),
        (
            LoraConfig,
            {"modules_to_save": ["lm_head"]},
            "modules_to_save.*train without modules_to_save",
        ),
        (LoraConfig, {"bias": "all"}, "bias='all'.*train with bias='none'"),
        (LoraConfig, {"lora_bias": True}, "lora_bias=True.*biases"),
        (LoraConfig, {"target_modules": ["embed_tokens", "q_proj"]}, "embedding.*target_modules"),
        (LoraConfig, {"trainable_token_indices": [1, 2]}, "trainable_token_indices.*embeddings"),
        (LoraConfig, {"alora_invocation_tokens": [1, 2]}, "aLoRA.*train it again"),
        (LoraConfig, {"layer_replication": [(0, 2), (1, 3)]}, "layer_replication.*repeats layers"),
        (LoraConfig, {"init_lora_weights": "pissa"}, "'pissa'.*path_initial_model"),
        (LoraConfig, {"init_lora_weights": "olora"}, "'olora'.*path_initial_model"),
        (
            peft.IA3Config,
            {"target_modules": ["k_proj"], "feedforward_modules": []},
            "'IA3'.*merge_and",
        ),
        (peft.LoHaConfig, {"target_modules": ["q_proj"]}, "'LOHA'.*merge_and"),
        (peft.PromptTuningConfig, {"num_virtual_tokens": 4}, "'PROMPT_TUNING'.*train it again"),
        (peft.PromptEncoderConfig, {"num_virtual_tokens": 4}, "'P_TUNING'.*train it again"),
        (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}, "'PREFIX_TUNING'.*train it again"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_peft_saves_it_and_the_engine_cannot_do_it(
    tmp_path: Path, kind: Any, values: Any, message: str
) -> None:
    if kind is LoraConfig:
        values = {"target_modules": ["q_proj"], **values}
    config = kind(task_type="CAUSAL_LM", **values)
    source = save(wrapped(config), tmp_path / "source")
    with pytest.raises(Invalid, match=message):
        check(source, LIMITS)
    if kind is LoraConfig and not config.layer_replication:
        # The tensors alone give most of them away too.
        flags = dict.fromkeys(("use_dora", "lora_bias", "modules_to_save"))
        names = load_file(source / WEIGHTS)
        if any(not name.endswith(("lora_A.weight", "lora_B.weight")) for name in names):
            edit(source, bias="none", trainable_token_indices=None, **flags)
            with pytest.raises(Invalid, match="The tensor 'base_model"):
                check(source, LIMITS)


def test_a_high_rank(tmp_path: Path) -> None:
    source = lora(tmp_path / "lora", rank_pattern={"1.mlp.down_proj": 24})
    message = r"rank 24 \(at model.layers.1.mlp.down_proj\).*limit of 16; train with a lower"
    with pytest.raises(Invalid, match=message):
        check(source, LIMITS)
    source = adalora(tmp_path / "adalora", prune=False)
    with pytest.raises(Invalid, match=r"rank 6 .*limit of 5"):
        check(source, replace(LIMITS, max_rank=5))


def test_large_weights(tmp_path: Path) -> None:
    source = lora(tmp_path / "lora")
    size = (source / WEIGHTS).stat().st_size
    assert check(source, replace(LIMITS, max_bytes=size))
    with pytest.raises(Invalid, match=f"has {size} bytes, above the limit of {size - 1}"):
        check(source, replace(LIMITS, max_bytes=size - 1))
    source = adalora(tmp_path / "adalora", dtype=torch.bfloat16)
    written = copied(source, LIMITS, tmp_path / "copy")[0] / WEIGHTS
    size = written.stat().st_size
    assert check(source, replace(LIMITS, max_bytes=size))
    with pytest.raises(Invalid, match=f"would take, as plain LoRA in float32, {size} bytes"):
        check(source, replace(LIMITS, max_bytes=size - 1))
