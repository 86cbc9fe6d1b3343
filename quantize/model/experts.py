"""Mixture-of-experts layers as separate linear layers.

transformers holds all experts of a block in two 3-D parameters, so that their inputs cannot be
recorded, nor their weights quantized, one by one. On disk and in vLLM each expert has linear layers
of its own, and so it has here. Used by calibration/runner.py and quality/dequantized.py.
"""

# Shapes: N = tokens, K = experts per token, H = hidden size.

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

SAMPLE_EVERY = 16
"""While inputs are recorded, every expert also gets every 16th token of the batch. Without this
sample, a rarely chosen expert would be calibrated on a handful of tokens."""


class Expert(nn.Module):
    """One gated MLP."""

    def __init__(self, hidden: int, inner: int, activation: Any, **kind: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, **kind)
        self.up_proj = nn.Linear(hidden, inner, bias=False, **kind)
        self.down_proj = nn.Linear(inner, hidden, bias=False, **kind)
        self._activation = activation

    def forward(self, x_NH: Tensor) -> Tensor:
        activated: Tensor = self._activation(self.gate_proj(x_NH))
        made: Tensor = self.down_proj(activated * self.up_proj(x_NH))
        return made


class Experts(nn.ModuleList):
    """Computes what a fused experts module of transformers computes, expert by expert."""

    def __init__(self, fused: Any) -> None:
        """Takes the sizes, dtype and device of `fused`, and views of its weights."""
        count, twice_inner, hidden = fused.gate_up_proj.shape
        inner = twice_inner // 2
        kind = {"device": fused.gate_up_proj.device, "dtype": fused.gate_up_proj.dtype}
        super().__init__(Expert(hidden, inner, fused.act_fn, **kind) for _ in range(count))
        self.is_recorded = False
        self.tokens: list[int] = [0] * count
        """The number of tokens that were routed to each expert while inputs were recorded."""
        for number, expert in enumerate(self.all):
            gate, up = fused.gate_up_proj.data[number].split(inner)
            expert.gate_proj.weight.data = gate
            expert.up_proj.weight.data = up
            expert.down_proj.weight.data = fused.down_proj.data[number]

    @property
    def all(self) -> list[Expert]:
        return [cast(Expert, expert) for expert in self]

    def forward(self, x_NH: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        sample = x_NH[::SAMPLE_EVERY] if self.is_recorded else x_NH[:0]
        output_NH = torch.zeros_like(x_NH)
        for number, expert in enumerate(self.all):
            token, place = torch.where(chosen_NK == number)
            if self.is_recorded:
                self.tokens[number] += len(token)
            elif not len(token):
                continue
            made = expert(torch.cat([x_NH[token], sample]))[: len(token)]
            made = made * weights_NK[token, place, None]
            output_NH.index_add_(0, token, made.to(output_NH.dtype))
        return output_NH


def unfuse_experts(model: nn.Module) -> None:
    """Replace all fused experts modules of the model by `Experts`, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            gate_up = getattr(child, "gate_up_proj", None)
            if isinstance(gate_up, nn.Parameter) and gate_up.ndim == 3:
                setattr(parent, name, Experts(child))
