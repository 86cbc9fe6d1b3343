"""Model families as data: where the decoder blocks are, which linear layers share a scheme, and
which weights may be rescaled without changing the model's function.

vLLM fuses q, k and v into one layer and gate and up into another, so the layers of such a group
must be quantized alike, or vLLM does not load the checkpoint. The key is the config's `model_type`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

Group = tuple[str, ...]
"""Linear layers that share their input."""


@dataclass(frozen=True)
class Family:
    """Names are relative to a block, but for `block_prefix`: the names of block 3's tensors begin
    with `block_prefix` + `3.`.
    """

    block_prefix: str
    fused: tuple[Group, ...]
    """Groups of linear layers that share their input, without experts, in the order in which a
    token meets them. A block need not have all of them."""
    smoothing: tuple[tuple[str, tuple[str, ...]], ...]
    """(source, layers): a factor per channel can move from the source's outputs to the layers'
    inputs. A source is a norm, or a linear layer with as many outputs as the layers have inputs."""
    parts: tuple[tuple[str, str], ...] = (
        ("self_attn", "self_attn.o_proj"),
        ("mlp", "mlp.down_proj"),
    )
    """(module, layer): the module's output is that of its last layer, so that the module need not
    run again once the inputs of this layer are stored."""
    residuals: tuple[tuple[str, str], ...] = ()
    """(layer, norm): the layer's output is added to the residual stream, which is the input of the
    norm."""
    norm_offset: float = 0.0
    """Norms multiply by their weight plus this offset."""
    experts: str | None = None
    """The module with a block's experts, whose layers are `<experts>.<number>.gate_proj` etc."""
    router: str | None = None
    """The layer that routes tokens to experts; it is never quantized."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(part of a name in transformers' modules, the same part in files)."""

    def on_disk(self, name: str) -> str:
        """The name in files of a layer or tensor, from its name in the module."""
        for module, disk in self.renamed:
            name = name.replace(module, disk)
        return name

    def in_module(self, name: str) -> str:
        """The inverse of `on_disk`."""
        for module, disk in self.renamed:
            name = name.replace(disk, module)
        return name

    def stages(self, names: Collection[str]) -> list[list[Group]]:
        """The groups of a block with tensors of these names (as in the module), in the order in
        which a token meets them. The groups of one stage do not depend on each other.
        """
        found = [[group] for group in self.fused if f"{group[0]}.weight" in names]
        count = 0
        while self.experts and f"{self.experts}.{count}.gate_proj.weight" in names:
            count += 1
        if count:
            every = [f"{self.experts}.{number}" for number in range(count)]
            found.append([(f"{one}.gate_proj", f"{one}.up_proj") for one in every])
            found.append([(f"{one}.down_proj",) for one in every])
        return found

    def is_expert(self, layer: str) -> bool:
        return self.experts is not None and layer.startswith(f"{self.experts}.")


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
_GEMMA = replace(_LLAMA, norm_offset=1.0)
# Norms come before and after attention and MLP; a layer's output passes a norm before it is added
# to the residual stream, so no `residuals`.
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

_MOE = replace(
    _LLAMA,
    # The norm before the experts also feeds the router, so no factors move out of it.
    smoothing=(("input_layernorm", _QKV), _V_TO_O, _UP_TO_DOWN),
    experts="mlp.experts",
    router="mlp.gate",
)
_MIXTRAL = replace(
    _MOE,
    renamed=(
        ("mlp.", "block_sparse_moe."),
        (".gate_proj", ".w1"),
        (".down_proj", ".w2"),
        (".up_proj", ".w3"),
    ),
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
}
