"""Layouts on disk: what is written is what an independent reader takes out again."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from quantize import formats
from quantize.errors import Unsupported
from quantize.grid import Codes, Grid, round_to_nearest


def some_codes(grid: Grid, *, outputs: int = 16, inputs: int = 256) -> Codes:
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    return round_to_nearest(weight_OI, grid, scale_dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "grid"), [("compressed-tensors", Grid(8)), ("gptq", Grid(4, 128))]
)
def test_reading_gives_back_what_was_written(name: str, grid: Grid) -> None:
    layout = formats.by_name(name)
    codes = some_codes(grid)
    tensors = layout.tensors("a.b", codes)
    assert layout.linears(list(tensors)) == ["a.b"]
    read = layout.read("a.b", tensors.__getitem__, layout.config(grid))
    assert read.dequantize().equal(codes.dequantize())


def test_gptq_follows_the_published_layout() -> None:
    """Dequantized word by word with plain integers, as the format's description says."""
    codes = some_codes(Grid(4, 32), outputs=8, inputs=64)
    tensors = formats.by_name("gptq").tensors("l", codes)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "l.qweight": (8, 8), "l.scales": (2, 8), "l.qzeros": (2, 1), "l.g_idx": (64,),
    }  # fmt: skip
    for row in range(64):
        for column in range(8):
            word = tensors["l.qweight"][row // 8, column].item() & 0xFFFFFFFF
            code = (word >> (4 * (row % 8))) & 15
            group = tensors["l.g_idx"][row].item()
            zero_word = tensors["l.qzeros"][group, column // 8].item() & 0xFFFFFFFF
            zero = ((zero_word >> (4 * (column % 8))) & 15) + 1  # version 1 stores it minus one
            weight = (code - zero) * tensors["l.scales"][group, column].item()
            assert weight == pytest.approx(codes.dequantize()[column, row].item(), abs=1e-7)
    assert tensors["l.qzeros"].unique().tolist() == [0x77777777]


def test_compressed_tensors_config_is_one_its_library_accepts() -> None:
    config = formats.by_name("compressed-tensors").config(Grid(8))
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    assert scheme.weights.num_bits == 8
    assert scheme.weights.strategy == "channel"
    assert scheme.input_activations.dynamic


def test_an_unknown_layout_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="'marlin' is not known"):
        formats.by_name("marlin")
