"""Zero points of asymmetric grids, by the error that they leave."""

from __future__ import annotations

import pytest
import torch
from packhorse.quantize.numerics.grid import Grid, round_to_nearest


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_further_from_its_code_than_half_a_step(bits: int) -> None:
    """At both ends of a group too, which a zero point that is rounded one way only would cut."""
    generator = torch.Generator().manual_seed(0)
    shift_O1 = torch.linspace(-2, 2, 64)[:, None]
    weight_OI = torch.randn(64, 128, generator=generator) + shift_O1
    codes = round_to_nearest(weight_OI, Grid(bits, 32, symmetric=False), scale_dtype=torch.float32)
    error_OGI = (codes.dequantize() - weight_OI).reshape(*codes.scales_OG.shape, -1)
    steps_OGI = error_OGI.abs() / codes.scales_OG.unsqueeze(2)
    assert steps_OGI.max() <= 0.5 + 1e-4
