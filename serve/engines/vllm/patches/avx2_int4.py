"""A kernel for 4-bit weights on x86 CPUs without AVX-512, where vLLM's build has none.

Installed by plugin.py. See docs/decisions/0008-4-bit-without-avx512.md.
"""

from __future__ import annotations

from pathlib import Path

import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32,
)
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from packhorse.serve.engines.vllm.patches import probing
from packhorse.serve.engines.vllm.patches.cpu_features import without_avx512

NAME = "avx2_int4"
KIND = "correctness"
APPLIES_TO = {
    "vllm.model_executor.kernels.linear": {
        "_POSSIBLE_KERNELS": "names: MPLinearKernel CPU",
        "choose_mp_linear_kernel": "sha256:40b1046a2d24690d",
    },
    "vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel": {
        "MPLinearLayerConfig": "sha256:e052712be11f85b8",
        "MPLinearKernel.__init__": "sha256:31473c9f1bb1a069",
        "MPLinearKernel.get_min_capability": "call()",
        "MPLinearKernel.can_implement": "call(c)",
        "MPLinearKernel.process_weights_after_loading": "call(layer)",
        "MPLinearKernel.apply_weights": "call(layer, x, bias)",
    },
    "vllm.model_executor.layers.linear": {
        "UnquantizedLinearMethod.apply": "call(layer, x, bias)",
        "UnquantizedLinearMethod.process_weights_after_loading": "call(layer)",
    },
    "vllm.model_executor.layers.quantization.utils.quant_utils": {
        "unpack_quantized_values_into_int32": "call(w_q, wtype, packed_dim)",
    },
    "torch.cpu": {
        "_is_avx512_supported": "call()",
    },
}
WITHOUT = "4-bit weights have no kernel on a CPU without AVX-512: vLLM's says yes and has no code."

_ZERO = {scalar_types.uint4: 0, scalar_types.uint4b8: 8}


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


def install() -> None:
    """Put the kernel before vLLM's, which says yes and then has no code. Twice is as once."""
    kernels = _POSSIBLE_KERNELS[PlatformEnum.CPU]
    if without_avx512() and AVX2Int4Kernel not in kernels:
        kernels.insert(0, AVX2Int4Kernel)


class AVX2Int4Kernel(MPLinearKernel):
    """Unpacks 4-bit codes once, on load; from there on the layer is one that was never quantized.

    So it answers as the codes say, as fast as the original and in as much memory as the original.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if c.weight_type not in _ZERO:
            return False, f"weights of {c.weight_type}, neither uint4 nor uint4b8"
        return without_avx512(), "the CPU has AVX-512"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Replaces packed codes, scales and zero points by `layer.weight`, [out, in]."""
        codes = self._outputs_first(self._codes(layer, self.w_q_name), layer, self.w_q_name)
        scales = self._outputs_first(getattr(layer, self.w_s_name).data, layer, self.w_s_name)
        zeros = torch.tensor(_ZERO[self.config.weight_type])
        if self.config.zero_points:
            assert self.w_zp_name
            zeros = self._outputs_first(
                self._codes(layer, self.w_zp_name), layer, self.w_zp_name
            ).unsqueeze(-1)
        grouped = codes.reshape(*scales.shape, -1)
        weight = (grouped - zeros) * scales.float().unsqueeze(-1)
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name and hasattr(layer, name):
                delattr(layer, name)
        layer.weight = torch.nn.Parameter(
            weight.flatten(1).to(self.config.act_type), requires_grad=False
        )
        self._plain = UnquantizedLinearMethod()
        self._plain.process_weights_after_loading(layer)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        output: torch.Tensor = self._plain.apply(layer, x, bias)
        return output

    def _codes(self, layer: torch.nn.Module, name: str) -> torch.Tensor:
        packed = getattr(layer, name)
        codes: torch.Tensor = unpack_quantized_values_into_int32(
            packed.data, self.config.weight_type, packed.packed_dim
        )
        return codes

    @staticmethod
    def _outputs_first(values: torch.Tensor, layer: torch.nn.Module, name: str) -> torch.Tensor:
        """[out, in or groups], whichever way the checkpoint has it."""
        return values if getattr(layer, name).output_dim == 0 else values.t()
