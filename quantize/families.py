"""Model families as data: where the decoder blocks are, which linear layers share one scheme, and
what may be rescaled without changing what the model computes.

vLLM fuses q, k, v into one kernel and gate, up into another, so each fused group must be quantized
alike or loading fails. A family is found by the config's `model_type`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """All names are within a block; `block_prefix` + `3.` is where block 3's tensors begin."""

    block_prefix: str
    fused: tuple[tuple[str, ...], ...]
    """Groups of linear layers that share their input, in the order in which a token meets them."""
    smoothing: tuple[tuple[str, tuple[str, ...]], ...]
    """(source, layers): a factor per channel can move from what the source puts out into what the
    layers take in. A source is a norm, or a linear layer with as many outputs as they have inputs.
    """
    parts: tuple[tuple[str, str], ...] = (
        ("self_attn", "self_attn.o_proj"),
        ("mlp", "mlp.down_proj"),
    )
    """(module, layer): the module puts out what its last layer does, so that it need not run again
    once that layer's inputs are known."""
    residuals: tuple[tuple[str, str], ...] = ()
    """(layer, norm): the layer's output is added to what that norm is given."""
    norm_offset: float = 0.0
    """Norms multiply by their weight plus this."""

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.fused for name in group)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_FUSED = (_QKV, ("self_attn.o_proj",), _GATE_UP, ("mlp.down_proj",))
_V_TO_O = ("self_attn.v_proj", ("self_attn.o_proj",))
_UP_TO_DOWN = ("mlp.up_proj", ("mlp.down_proj",))

_LLAMA = Family(
    "model.layers.",
    _FUSED,
    smoothing=(
        ("input_layernorm", _QKV),
        _V_TO_O,
        ("post_attention_layernorm", _GATE_UP),
        _UP_TO_DOWN,
    ),
    residuals=(
        ("self_attn.o_proj", "input_layernorm"),
        ("mlp.down_proj", "post_attention_layernorm"),
    ),
)
_GEMMA = Family(_LLAMA.block_prefix, _FUSED, _LLAMA.smoothing, _LLAMA.residuals, norm_offset=1.0)
# Norms before and after both parts of a block; the ones behind them are no plain residual.
_GEMMA2 = Family(
    _LLAMA.block_prefix,
    _FUSED,
    smoothing=(
        ("input_layernorm", _QKV),
        _V_TO_O,
        ("pre_feedforward_layernorm", _GATE_UP),
        _UP_TO_DOWN,
    ),
    norm_offset=1.0,
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
}
