"""Bits per weight from headers: every layout, with what was not quantized."""

from __future__ import annotations

from pathlib import Path

import pytest

from packhorse.quantize.model import sizes
from packhorse.quantize.model.dtypes import bits_of
from packhorse.quantize.numerics.grid import QuantizationArgs, Scheme
from tests.unit.quantize.test_dequantized import tiny_llama, write_checkpoint

LINEAR = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
"""Weights in the linear layers of the two blocks."""
PLAIN = 2 * 96 * 64 + 5 * 64
"""Embeddings, head and norms."""


@pytest.mark.parametrize(
    ("name", "scheme", "bits"),
    [
        # 32 bits of a float32 scale over 32 weights, and of a row's shape, over a layer.
        ("compressed-tensors", Scheme(QuantizationArgs(4, 32)), 4 + 32 / 32 + 14 * 128 / LINEAR),
        (
            "gptq",
            Scheme(QuantizationArgs(4, 32)),
            4 + 32 / 32 + 4 / 32 + 2 * (6 * 64 + 128) * 32 / LINEAR,
        ),
        ("awq", Scheme(QuantizationArgs(4, 32, symmetric=False)), 4 + 32 / 32 + 4 / 32),
    ],
)
def test_every_layout_counts_its_weights_and_the_bytes_around_them(
    name: str, scheme: Scheme, bits: float, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "made", name, scheme)
    found = sizes.of(tmp_path / "made")
    assert found["quantized"]["layers"] == 14
    assert found["quantized"]["parameters"] == LINEAR
    assert found["quantized"]["bits_per_weight"] == pytest.approx(bits, abs=1e-3)
    assert found["left_alone"]["parameters"] == PLAIN
    assert found["left_alone"]["bits_per_weight"] == 32
    assert found["left_alone"]["largest"][0] == {
        "name": "lm_head.weight", "bytes": 96 * 64 * 4, "dtype": "F32"
    }  # fmt: skip
    assert found["parameters"] == LINEAR + PLAIN
    parts = found["quantized"]["bytes"] + found["left_alone"]["bytes"]
    assert found["bytes"] == parts < (tmp_path / "made/model.safetensors").stat().st_size


def test_scales_of_a_cache_are_no_weights_and_a_plain_model_has_no_quantized_part(
    tmp_path: Path,
) -> None:
    write_checkpoint(
        tmp_path / "made", "compressed-tensors", Scheme(QuantizationArgs(8), 8), kv_scales=True
    )
    found = sizes.of(tmp_path / "made")
    assert found["parameters"] == LINEAR + PLAIN
    tiny_llama().save_pretrained(tmp_path / "plain")
    plain = sizes.of(tmp_path / "plain")
    assert plain["quantized"] is None
    assert plain["bits_per_weight"] == 32
    assert [bits_of(name) for name in ("BF16", "F8_E4M3", "I64", "BOOL")] == [16, 8, 64, 8]
