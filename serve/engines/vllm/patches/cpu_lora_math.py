"""What LoRA adapters add to the outputs of a layer, on a CPU: right, and in a fraction of the time.

vLLM 0.32 copies both factors of an adapter for every token, and takes those of the last slot for
tokens without an adapter: in a batch with both, requests to the base model are answered by whoever
has that slot (docs/lab-log.md). Here all adapters of a step are one product, and a mask leaves to
each token its own. Runs in vLLM's own child; see worker.py.
"""

# Shapes: T = tokens, N = adapters of the step, R = rank, L = slots, I and O = inputs and outputs of
# a layer.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class MaskedLora(PunicaWrapperCPU):
    """In place of vLLM's, for linear layers; nothing else is adapted here."""

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
        """Nothing: adapters with a head are refused (serve/adapters). vLLM calls this for all the
        others too, with factors of zeros, and with a row for each token of a prompt whose
        log-probabilities are asked for: its own expects one a request, and ends the engine then.
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
