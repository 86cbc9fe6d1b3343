"""Whole quantized checkpoints of a tiny model: read back as a model, and described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.quantize import formats
from packhorse.quantize.errors import BadInput
from packhorse.quantize.numerics.grid import (
    QuantizationArgs,
    Scheme,
    round_activations,
    round_to_nearest,
)
from packhorse.quantize.quality import dequantized
from packhorse.quantize.report.inspect import inspect

W4 = Scheme(QuantizationArgs(4, 32))
ASYMMETRIC = Scheme(QuantizationArgs(4, 32, symmetric=False))
every_layout = pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("compressed-tensors", W4),
        ("compressed-tensors", ASYMMETRIC),
        ("compressed-tensors", Scheme(QuantizationArgs(8, None, symmetric=False))),
        ("compressed-tensors", Scheme(QuantizationArgs(8), 8)),
        ("compressed-tensors", Scheme(QuantizationArgs(8, floating=True), 8)),
        ("gptq", W4),
        ("gptq", Scheme(QuantizationArgs(8))),
        ("awq", ASYMMETRIC),
        ("awq", Scheme(QuantizationArgs(4))),
    ],
)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_checkpoint(folder: Path, name: str, scheme: Scheme, *, kv_scales: bool = False) -> Any:
    """Quantize a tiny model into `folder`; returns the model with the same weights dequantized."""
    model = tiny_llama()
    layout = formats.make(name, scheme)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if ".layers." in key and key.endswith("_proj.weight"):
            codes = round_to_nearest(tensor, scheme.weights, scale_dtype=torch.float32)
            state |= layout.tensors(key.removesuffix(".weight"), codes)
            tensor.copy_(codes.dequantize())
        else:
            state[key] = tensor
    if kv_scales:
        for block in range(2):
            for part in ("k_scale", "v_scale"):
                state[f"model.layers.{block}.self_attn.{part}"] = torch.ones(1)
    folder.mkdir()
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors"
    )
    quantization = layout.config(ignore=["lm_head"], kv_scales=kv_scales)
    config = {**model.config.to_dict(), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.arange(1, 33)[None]).logits
    return logits


@every_layout
def test_a_checkpoint_is_simulated_as_its_scheme_says(
    name: str, scheme: Scheme, tmp_path: Path
) -> None:
    wanted = write_checkpoint(tmp_path / "made", name, scheme)
    if scheme.activation_bits == 8:
        floating = scheme.weights.floating
        for key, module in wanted.named_modules():
            if key.endswith("_proj"):
                module.register_forward_pre_hook(
                    lambda _, inputs: (round_activations(inputs[0], floating=floating),)
                )
    found = dequantized.load(tmp_path / "made")
    for key, tensor in wanted.state_dict().items():
        assert found.state_dict()[key].equal(tensor)
    assert logits_of(found).equal(logits_of(wanted))


def test_scales_of_the_kv_cache_are_no_weights(tmp_path: Path) -> None:
    wanted = write_checkpoint(tmp_path / "made", "compressed-tensors", W4, kv_scales=True)
    assert logits_of(dequantized.load(tmp_path / "made")).equal(logits_of(wanted))
    quantization = inspect(tmp_path / "made")["quantization"]
    assert quantization["kv_cache"] is True


@pytest.mark.parametrize("fault", ["another shape", "missing", "extra", "plain"])
def test_a_checkpoint_that_is_not_what_its_config_says_is_refused(
    fault: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    message = {
        "another shape": r"model.norm.weight is \(1,\), but the model has \(64,\)",
        "missing": r"missing \['model.norm.weight'\], unexpected \[\]",
        "extra": r"missing \[\], unexpected \['model.other'\]",
        "plain": "its config says quantized, but no layer is",
    }[fault]
    if fault == "another shape":
        state["model.norm.weight"] = torch.ones(1)
    elif fault == "missing":
        del state["model.norm.weight"]
    elif fault == "extra":
        state["model.other"] = torch.ones(1)
    else:
        layout = formats.make("gptq", W4)
        config["quantization_config"] = layout.config(ignore=[], kv_scales=False)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=message):
        dequantized.load(tmp_path)


@every_layout
def test_inspect_names_the_scheme(name: str, scheme: Scheme, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "made", name, scheme)
    quantization = inspect(tmp_path / "made")["quantization"]
    layout = "pack-quantized"
    if scheme.activation_bits == 8:
        layout = "float-quantized" if scheme.weights.floating else "int-quantized"
    assert quantization == {
        "method": name,
        "format": {"gptq": "gptq", "awq": "gemm"}.get(name, layout),
        "type": "float" if scheme.weights.floating else "int",
        "weight_bits": scheme.weights.bits,
        "group_size": scheme.weights.group_size,
        "symmetric": scheme.weights.symmetric and name != "awq",
        "activation_bits": scheme.activation_bits,
        "others": [],
        "kv_cache": False,
    }
