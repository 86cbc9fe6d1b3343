"""The kernel for 4-bit weights on CPUs for which vLLM has none. Checkpoints in e2e/test_loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, choose_mp_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    pack_quantized_values_into_int32,
)
from vllm.platforms import PlatformEnum
from vllm.scalar_type import ScalarType, scalar_types

from packhorse.serve.engines.vllm.patches.avx2_int4 import AVX2Int4Kernel, install

IN, OUT, GROUP = 64, 32, 16


@pytest.fixture(autouse=True)
def no_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    before = list(_POSSIBLE_KERNELS[PlatformEnum.CPU])
    monkeypatch.setitem(_POSSIBLE_KERNELS, PlatformEnum.CPU, before)


def config(weight_type: ScalarType, *, zero_points: bool = False) -> MPLinearLayerConfig:
    return MPLinearLayerConfig((IN, OUT), (IN, OUT), weight_type, torch.float32, GROUP, zero_points)


def parameter(values: torch.Tensor, **about: Any) -> torch.nn.Parameter:
    made = torch.nn.Parameter(values, requires_grad=False)
    for name, value in about.items():
        setattr(made, name, value)
    return made


def packed(codes: torch.Tensor, kind: ScalarType, dim: int, output_dim: int) -> torch.nn.Parameter:
    values = pack_quantized_values_into_int32(codes, kind, dim)
    return parameter(values, packed_dim=dim, output_dim=output_dim)


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors", "with zero points"])
def test_products_are_those_of_the_codes(layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (OUT, IN), generator=generator, dtype=torch.int32)
    scales = torch.rand(OUT, IN // GROUP, generator=generator)
    zeros = torch.full((OUT, IN // GROUP), 8, dtype=torch.int32)
    symmetric = layout in ("gptq", "compressed-tensors")
    kind = scalar_types.uint4b8 if symmetric else scalar_types.uint4
    layer = torch.nn.Module()
    if layout in ("gptq", "awq"):  # the AWQ layout arrives as vLLM has turned it
        layer.codes = packed(codes.t().contiguous(), kind, 0, 1)
        layer.scales = parameter(scales.t().contiguous(), output_dim=1)
    else:
        layer.codes = packed(codes, kind, 1, 0)
        layer.scales = parameter(scales, output_dim=0)
    if not symmetric:
        zeros = torch.randint(0, 16, zeros.shape, generator=generator, dtype=torch.int32)
        layer.zeros = packed(zeros, kind, 0, 0)
    kernel = AVX2Int4Kernel(
        config(kind, zero_points=not symmetric), "codes", "scales", None if symmetric else "zeros"
    )
    kernel.process_weights_after_loading(layer)
    inputs, bias = torch.randn(3, IN, generator=generator), torch.randn(OUT, generator=generator)
    weight = (codes - zeros.repeat_interleave(GROUP, 1)) * scales.repeat_interleave(GROUP, 1)
    torch.testing.assert_close(
        kernel.apply_weights(layer, inputs, bias), inputs @ weight.t() + bias
    )
    assert not {"codes", "scales", "zeros"} & {name for name, _ in layer.named_parameters()}


def test_the_plugin_is_chosen_where_vllm_has_no_kernel_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install()
    install()
    assert _POSSIBLE_KERNELS[PlatformEnum.CPU].count(AVX2Int4Kernel) == 1
    asked = config(scalar_types.uint4b8)
    assert choose_mp_linear_kernel(asked) is AVX2Int4Kernel
    refused, why = AVX2Int4Kernel.can_implement(config(scalar_types.uint8b128))
    assert (refused, why) == (False, "weights of uint8b128, neither uint4 nor uint4b8")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert choose_mp_linear_kernel(asked) is not AVX2Int4Kernel
