"""Model families as data: where the decoder blocks are and which linear layers share one scheme.

vLLM fuses q, k, v into one kernel and gate, up into another, so each fused group must be quantized
alike or loading fails. A family is found by the config's `model_type`.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantize.errors import Unsupported


@dataclass(frozen=True)
class Family:
    """`block_prefix` + `3.` is where block 3's tensors begin; each tuple of `fused` is one group of
    linear layers.
    """

    block_prefix: str
    fused: tuple[tuple[str, ...], ...]

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.fused for name in group)


_LLAMA = Family(
    "model.layers.",
    (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
)

FAMILIES: dict[str, Family] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


def family_of(model_type: str) -> Family:
    """Raises Unsupported with the known families."""
    if model_type not in FAMILIES:
        raise Unsupported(
            f"model_type {model_type!r} is not known; known are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
