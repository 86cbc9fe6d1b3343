"""The base's layers are found with their true sizes, however their weights are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from packhorse.quantize import formats
from packhorse.quantize.numerics.grid import QuantizationArgs, Scheme, round_to_nearest
from packhorse.serve.adapters.base_layers import linear_layers
from packhorse.serve.errors import Invalid
from tests.conftest import DEMO

OUTPUTS, INPUTS = 48, 96
UP = "model.layers.0.mlp.up_proj"


def save(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_demo_model_is_what_transformers_builds() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO / "model"))
    expected = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert linear_layers(DEMO / "model") == expected
    assert len(expected) == 5 * 7


def test_shards_are_read_by_their_index(tiny_checkpoint: Path) -> None:
    layers = linear_layers(tiny_checkpoint)
    assert len(layers) == 3 * 7
    assert layers["model.layers.1.mlp.gate_proj"] == (192, 128)
    assert layers["model.layers.2.self_attn.k_proj"] == (64, 128)


def test_a_hub_cache_is_made_of_links(tmp_path: Path) -> None:
    blobs = save(tmp_path / "blobs", {f"{UP}.weight": torch.zeros(OUTPUTS, INPUTS)})
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(blobs / name)
    assert linear_layers(snapshot) == {UP: (OUTPUTS, INPUTS)}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("compressed-tensors", Scheme(QuantizationArgs(4, 32))),
        ("compressed-tensors", Scheme(QuantizationArgs(4, 32, symmetric=False))),
        ("compressed-tensors", Scheme(QuantizationArgs(8))),
        ("compressed-tensors", Scheme(QuantizationArgs(8), 8)),
        ("compressed-tensors", Scheme(QuantizationArgs(8, floating=True), 8)),
        ("gptq", Scheme(QuantizationArgs(4, 32))),
        ("gptq", Scheme(QuantizationArgs(8))),
        ("awq", Scheme(QuantizationArgs(4, 32, symmetric=False))),
    ],
    ids=str,
)
def test_every_layout_that_quantize_writes(tmp_path: Path, name: str, scheme: Scheme) -> None:
    layout = formats.make(name, scheme)
    weight_OI = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
    quantized = round_to_nearest(weight_OI, scheme.weights, scale_dtype=torch.float32)
    folder = save(
        tmp_path / "model",
        {
            **layout.tensors(UP, quantized),
            "model.layers.0.self_attn.q_proj.weight": torch.zeros(INPUTS, INPUTS),
            "model.layers.0.input_layernorm.weight": torch.zeros(INPUTS),
            "model.embed_tokens.weight": torch.zeros(256, INPUTS),
            "lm_head.weight": torch.zeros(256, INPUTS),
        },
        quantization_config=layout.config(ignore=["lm_head"], kv_scales=False),
    )
    assert linear_layers(folder) == {
        UP: (OUTPUTS, INPUTS),
        "model.layers.0.self_attn.q_proj": (INPUTS, INPUTS),
    }


def test_a_packed_row_may_be_filled_up(tmp_path: Path) -> None:
    tensors = {
        f"{UP}.weight_packed": torch.zeros(OUTPUTS, 13, dtype=torch.int32),
        f"{UP}.weight_shape": torch.tensor([OUTPUTS, 100], dtype=torch.int32),
        f"{UP}.weight_scale": torch.zeros(OUTPUTS, 1),
    }
    assert linear_layers(save(tmp_path / "model", tensors)) == {UP: (OUTPUTS, 100)}


def test_four_bit_floats_have_no_weight_shape(tmp_path: Path) -> None:
    tensors = {f"{UP}.weight_packed": torch.zeros(OUTPUTS, INPUTS // 2, dtype=torch.uint8)}
    assert linear_layers(save(tmp_path / "model", tensors)) == {UP: (OUTPUTS, INPUTS)}


def test_bits_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    tensors = {}
    for module, bits in (("a", 4), ("b", 8)):
        tensors[f"{module}.qweight"] = torch.zeros(INPUTS * bits // 32, OUTPUTS, dtype=torch.int32)
        tensors[f"{module}.qzeros"] = torch.zeros(3, OUTPUTS * bits // 32, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.zeros(3, OUTPUTS)
    tensors["c.qweight"] = torch.zeros(INPUTS * 4 // 32, OUTPUTS, dtype=torch.int32)  # no zeros
    folder = save(
        tmp_path / "model", tensors, quantization_config={"quant_method": "gptq", "bits": 4}
    )
    assert linear_layers(folder) == dict.fromkeys("abc", (OUTPUTS, INPUTS))


@pytest.mark.parametrize("module", ["wte", "model.tok_embeddings", "model.embed_positions"])
def test_tables_are_left_out(tmp_path: Path, module: str) -> None:
    tensors = {f"{module}.weight": torch.zeros(8, 8), f"{UP}.weight": torch.zeros(8, 4)}
    assert linear_layers(save(tmp_path / "model", tensors)) == {UP: (8, 4)}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (("qweight",), {}, "quant_method None.*known are gptq, awq"),
        (("qweight",), {"quant_method": "awq", "version": "gemv"}, "'gemv'"),
        (("qweight",), {"quant_method": "gptq", "bits": 40}, "40 bits.*1 to 16"),
        (("weight", "weight.absmax"), {}, "bitsandbytes"),
    ],
)
def test_a_layout_that_is_not_known_is_told(
    tmp_path: Path, tensors: tuple[str, ...], config: dict[str, Any], message: str
) -> None:
    values = {f"{UP}.{part}": torch.zeros(8, 8, dtype=torch.int32) for part in tensors}
    quantization = {"bits": 4, **config} if config else {"bits": 4}
    folder = save(tmp_path / "model", values, quantization_config=quantization)
    with pytest.raises(Invalid, match=message):
        linear_layers(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "0 safetensors files"),
        ({"a.safetensors": b"", "b.safetensors": b""}, "2 safetensors files and no"),
        ({"model.safetensors": b"abc"}, "too few"),
        ({"model.safetensors": b"\xff" * 16}, "are the limit"),
        ({"model.safetensors.index.json": b"{"}, "cannot be read as JSON"),
        ({"model.safetensors.index.json": b"[]"}, "not hold a JSON object"),
        ({"model.safetensors.index.json": b"{}"}, "no weight_map"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "x"}}'}, "No such file"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'}, "not a file of its"),
    ],
)
def test_a_broken_checkpoint_is_told(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Invalid, match=message):
        linear_layers(tmp_path)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="is not a folder"):
        linear_layers(tmp_path / "none")
