"""Looking into modules that run: what their layers are given, how large keys and values are; and
modules that stand in for others. Used by `blocks`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

RANGE = "packhorse_range"  # where an attention module that is watched has its KeyValueRange


@contextmanager
def fast_products() -> Iterator[None]:
    """Products of float32 matrices may round their factors to bfloat16 (CPUs with AMX) or TF32
    (GPUs); sums stay float32. The model is served in that precision, and statistics need no more;
    the solvers run outside.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Reached(Exception):
    """Ends a run where nothing behind is wanted."""


def run(
    module: nn.Module,
    watched: set[str],
    hidden: Tensor,
    keywords: dict[str, Any],
    *,
    last: str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """What the watched parts of a block are given, and what the block puts out. The run ends at the
    part `last`, and then the output is not one.
    """
    seen: dict[str, Tensor] = {}
    output = hidden
    with ExitStack() as hooks:
        for name in watched:

            def see(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = inputs[0]
                if name == last:
                    raise Reached

            handle = module.get_submodule(name).register_forward_pre_hook(see)
            hooks.callback(handle.remove)
        with suppress(Reached):
            output = hidden_of(module(hidden, **keywords))
    return seen, output


def hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@dataclass
class Continue:
    """In place of a module's forward: its last layer on what that is given."""

    layer: nn.Module
    given: Tensor
    tupled: bool

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        output = self.layer(self.given)
        return (output, None) if self.tupled else output


class Note(nn.Module):
    """In a block's place: passes its input on and keeps what it was last called with."""

    hidden: Tensor
    keywords: dict[str, Any]

    def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Tensor:
        self.hidden, self.keywords = hidden_states, keywords
        return hidden_states


def shared(value: Any, other: Any) -> Any:
    """The other in its place, wherever it is equal: positions and masks of rows that are as long,
    which would take as much memory for each batch.
    """
    if isinstance(value, dict) and isinstance(other, dict):
        return {name: shared(part, other.get(name)) for name, part in value.items()}
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return tuple(map(shared, value, other))
    if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
        return other if value.equal(other) else value
    return value


class Times(nn.Module):
    """In float32."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * self._factor


@dataclass
class KeyValueRange:
    key: float = 0.0
    value: float = 0.0


def watch_attention(config: Any) -> str:
    """The name of an attention that notes the range of keys and values where it is asked to: like
    sdpa, or where scores are capped (Gemma 2), which sdpa does not know, like the model's own.
    """
    kind = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    name = f"packhorse_{kind}"

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any
    ) -> Any:
        seen: KeyValueRange | None = getattr(module, RANGE, None)
        if seen is not None:
            seen.key = max(seen.key, key.abs().amax().item())
            seen.value = max(seen.value, value.abs().amax().item())
        if kind == "eager":
            own: Any = sys.modules[type(module).__module__]
            return own.eager_attention_forward(module, query, key, value, *args, **more)
        if torch.get_float32_matmul_precision() == "medium":  # in fast_products
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        output, weights = sdpa_attention_forward(module, query, key, value, *args, **more)
        return output.float(), weights

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    return name
