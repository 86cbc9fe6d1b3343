"""What LoRA adapters add to the outputs of a layer on a CPU: right, and in a fraction of the time.

vLLM 0.32 copies both factors of an adapter for every token, and takes those of the last slot for
tokens without an adapter: in a batch with both, requests to the base model are answered by the
adapter in that slot (docs/lab-log.md). Here all adapters of a step are one product, and a mask
leaves to each token its own adapter's share. Runs in the worker's process; PatchedCPUWorker calls
`install`.
"""

# Shapes: T = tokens, N = adapters of the step, R = rank, L = slots, I and O = inputs and outputs of
# a layer.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import base_linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from packhorse.serve.engines.vllm.patches import probing

NAME = "cpu_lora_math"
KIND = "correctness"
APPLIES_TO = {
    "vllm.lora.punica_wrapper.punica_cpu": {
        "PunicaWrapperCPU.__init__": "sha256:eeef8a2c0e1825d3",
        "PunicaWrapperCPU.add_lora_linear": "sha256:da9d97901165fc84",
        "PunicaWrapperCPU.add_lora_logits": "sha256:3b7c95e8a9ff77e1",
    },
    "vllm.lora.punica_wrapper.punica_base": {
        "PunicaWrapperBase.update_metadata": "sha256:5ccd19493a1b35fc",
        "PunicaWrapperBase.token_lora_indices": "sha256:16494f9ad47d0028",
    },
    "vllm.lora.punica_wrapper.punica_selector": {
        "get_punica_wrapper": "sha256:2f761e26be9291ae",
    },
    "vllm.lora.layers.base_linear": {
        "BaseLinearLayerWithLoRA._apply_sync": "sha256:3db278d3623409fa",
        "BaseLinearLayerWithLoRA._apply_lora_to_output": "sha256:8654e39a48d9f487",
        "BaseLinearLayerWithLoRA.__init__": "names: _get_lora_device",
    },
    "vllm.lora.layers.utils": {
        "_get_lora_device": "sha256:989cbfbfb40d3ebb",
    },
    "vllm.v1.worker.cpu_worker": {
        "CPUWorker": "names: Worker init_device",
        "CPUWorker.init_device": "call()",
    },
    "vllm.platforms.cpu": {
        "CpuPlatform.get_punica_wrapper": "sha256:27c5f358a5387ada",
    },
}
WITHOUT = "Beside an adapter's requests, those to the base model would be answered by an adapter."


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


def install() -> None:
    """Have vLLM take MaskedLora for its own wrapper, which it imports by name.

    Without AMX, W8A8 layers keep their weight in oneDNN only, and vLLM 0.32's LoRA layers, which
    ask the weight for its device, do not start on them: they are told that it is the CPU.
    """
    name = f"{MaskedLora.__module__}.{MaskedLora.__qualname__}"
    type(current_platform).get_punica_wrapper = classmethod(lambda _: name)
    base_linear._get_lora_device = lambda layer: torch.device("cpu")


class MaskedLora(PunicaWrapperCPU):
    """Takes the place of vLLM's wrapper, for linear layers; no other layer is adapted here."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        slots_T = self.token_lora_indices
        self._slots_N = slots_T[slots_T >= 0].unique()
        self._mask_TN = (slots_T[:, None] == self._slots_N[None]).float()

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds to y, (..., sum of output_slices), in place, for each slice of it
        scale * x a^T b^T, with the adapter of the row. x is (..., I); the factors of the slices are
        (L, 1, R, I) and (L, 1, O, R).
        """
        if not len(self._slots_N):
            return
        y_TO, x_TI = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]).float()
        pairs = zip(lora_a_stacked, lora_b_stacked, strict=True)
        for (a, b), part_TO in zip(
            pairs, torch.split(y_TO, list(output_slices), dim=-1), strict=True
        ):
            part_TO += scale * self._expand(self._shrink(x_TI, a), b)

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        """Adds nothing: adapters that change the head are refused (serve/adapters). vLLM calls this
        for all other adapters too, with factors of zeros. For a prompt whose log-probabilities are
        wanted it calls it with a row a token; vLLM's own method expects a row a request, and ends
        the engine then.
        """

    def _shrink(self, x_TI: Tensor, a: Tensor) -> Tensor:
        """(T, N * R), zeros but for the token's own adapter."""
        a_NRI = a[self._slots_N].squeeze(1)
        adapters, rank, inputs = a_NRI.shape
        h = x_TI @ a_NRI.reshape(adapters * rank, inputs).float().T
        own: Tensor = h.view(-1, adapters, rank) * self._mask_TN[:, :, None]
        return own.view(len(x_TI), -1)

    def _expand(self, shrunk: Tensor, b: Tensor) -> Tensor:
        """(T, O), float32."""
        b_NOR = b[self._slots_N].squeeze(1)
        return shrunk @ b_NOR.float().transpose(1, 2).reshape(shrunk.shape[1], -1)
