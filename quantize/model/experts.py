"""Mixture-of-experts layers, taken apart: transformers holds all experts of a block in two 3-D
parameters, which can be neither watched nor quantized one by one; on disk and in vLLM they are
linear layers of their own.

Used by `blocks` and `simulate`.
"""

# Shapes: N = tokens, K = experts a token is sent to, E = experts, H = hidden size, I = inner size.

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

SAMPLE_EVERY = 16
"""While layers are watched, every expert also sees one of so many of all tokens: one that is rarely
chosen would be quantized for a handful of them."""


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
    """What a fused experts module of transformers computes, expert by expert."""

    def __init__(self, fused: Any) -> None:
        """With the sizes, dtype and device of `fused`, and views of its weights."""
        count, twice_inner, hidden = fused.gate_up_proj.shape
        inner = twice_inner // 2
        kind = {"device": fused.gate_up_proj.device, "dtype": fused.gate_up_proj.dtype}
        super().__init__(Expert(hidden, inner, fused.act_fn, **kind) for _ in range(count))
        self.is_watched = False
        self.tokens: list[int] = [0] * count
        """Sent to each expert while it was watched."""
        for number, expert in enumerate(self.all):
            gate, up = fused.gate_up_proj.data[number].split(inner)
            expert.gate_proj.weight.data = gate
            expert.up_proj.weight.data = up
            expert.down_proj.weight.data = fused.down_proj.data[number]

    @property
    def all(self) -> list[Expert]:
        return [cast(Expert, expert) for expert in self]

    def forward(self, x_NH: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        sample = x_NH[::SAMPLE_EVERY] if self.is_watched else x_NH[:0]
        output_NH = torch.zeros_like(x_NH)
        for number, expert in enumerate(self.all):
            token, place = torch.where(chosen_NK == number)
            if self.is_watched:
                self.tokens[number] += len(token)
            elif not len(token):
                continue
            made = expert(torch.cat([x_NH[token], sample]))[: len(token)]
            made = made * weights_NK[token, place, None]
            output_NH.index_add_(0, token, made.to(output_NH.dtype))
        return output_NH


def take_apart(model: nn.Module) -> None:
    """Replace all fused experts modules within, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            gate_up = getattr(child, "gate_up_proj", None)
            if isinstance(gate_up, nn.Parameter) and gate_up.ndim == 3:
                setattr(parent, name, Experts(child))
