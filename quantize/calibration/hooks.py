"""Forward hooks and stand-in modules: they record layer inputs and ranges of keys and values, and
resume a part of a block at its last layer. Used by runner.py.
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

RANGE = "packhorse_range"
"""The attribute of a recorded attention module that holds its KeyValueRange."""


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Let float32 matrix products round their factors to bfloat16 (CPUs with AMX) or TF32 (GPUs)
    and accumulate in float32. The engine serves the model in that precision, and statistics need no
    more. Solvers run outside of this context.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class LastLayerReached(Exception):
    """Ends a forward pass at the last layer whose input is recorded."""


def run(
    module: nn.Module,
    recorded: set[str],
    hidden: Tensor,
    keywords: dict[str, Any],
    *,
    last: str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Run a block. Returns the inputs of the recorded submodules by name, and the block's output. A
    run with `last` ends at that submodule, and its output has no meaning.
    """
    seen: dict[str, Tensor] = {}
    output = hidden
    with ExitStack() as hooks:
        for name in recorded:

            def see(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = inputs[0]
                if name == last:
                    raise LastLayerReached

            handle = module.get_submodule(name).register_forward_pre_hook(see)
            hooks.callback(handle.remove)
        with suppress(LastLayerReached):
            output = hidden_states_of(module(hidden, **keywords))
    return seen, output


def hidden_states_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@dataclass
class ResumeAtLastLayer:
    """A forward for a module: it applies the module's last layer to a stored input of that layer,
    and ignores its arguments.
    """

    layer: nn.Module
    layer_input: Tensor
    tupled: bool

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        output = self.layer(self.layer_input)
        return (output, None) if self.tupled else output


class InputRecorder(nn.Module):
    """Stands in for a block: returns its input, and keeps the arguments of its latest call."""

    hidden: Tensor
    keywords: dict[str, Any]

    def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Tensor:
        self.hidden, self.keywords = hidden_states, keywords
        return hidden_states


def deduplicated(value: Any, other: Any) -> Any:
    """`value` with every tensor replaced by the equal one of `other`: position embeddings and masks
    are equal for all batches of one shape, and need to be in memory once.
    """
    if isinstance(value, dict) and isinstance(other, dict):
        return {name: deduplicated(part, other.get(name)) for name, part in value.items()}
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return tuple(map(deduplicated, value, other))
    if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape == other.shape:
        return other if value.equal(other) else value
    return value


class Scale(nn.Module):
    """Multiplies by a factor, in float32."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * self._factor


@dataclass
class KeyValueRange:
    key: float = 0.0
    value: float = 0.0


def register_recording_attention(config: Any) -> str:
    """Register an attention function that records the ranges of keys and values in modules with the
    attribute RANGE, and return its name. It computes as sdpa does; for models with capped scores
    (Gemma 2), which sdpa cannot compute, as the model's own eager attention.
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
        if torch.get_float32_matmul_precision() == "medium":  # in fast_matmul
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        output, weights = sdpa_attention_forward(module, query, key, value, *args, **more)
        return output.float(), weights

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    return name
