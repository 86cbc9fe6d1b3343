"""Scales of an 8-bit cache belong to what they are called after."""

from __future__ import annotations

from pathlib import Path

import pytest
from packhorse.quantize.model.checkpoint import Checkpoint
from safetensors.torch import load_file, save_file

from tests.unit.quantize.test_pipeline import LITTLE, made, quantized


@pytest.mark.parametrize(("large", "small"), [("k", "v"), ("v", "k")])
def test_large_keys_have_large_scales_and_values_too(
    large: str, small: str, tmp_path: Path
) -> None:
    model = made("llama", tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if f".{large}_proj." in name:
            tensor.mul_(64)
    save_file(tensors, file, {"format": "pt"})
    found = Checkpoint(quantized(model, tmp_path / "out", "gptq", kv="fp8", **LITTLE))
    for block in range(2):
        scales = {
            kind: found.get(f"model.layers.{block}.self_attn.{kind}_scale").item()
            for kind in (large, small)
        }
        assert scales[large] >= 8 * scales[small], "one is 64 times as large"
