"""A finished checkpoint as a transformers model: weights dequantized, activations rounded where the
kernel rounds them.

What it computes is what vLLM's kernels compute up to their own arithmetic, so figures from it are
marked "simulated". Reads what is on disk, not what is in memory: a packing mistake shows. Ours and
other tools' checkpoints alike.

Not simulated: an 8-bit KV cache, and kernels that round the activations of a weight-only scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from packhorse.quantize import formats
from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.experts import take_apart
from packhorse.quantize.model.families import FAMILIES
from packhorse.quantize.numerics.grid import round_activations
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

# Scales of the KV cache, and what transformers computes by itself nowadays.
_NOT_WEIGHTS = (".k_scale", ".v_scale", ".q_scale", "rotary_emb.inv_freq")


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, quantized or not, in the dtype of its config. One layer at a time is
    dequantized. Raises BadInput when tensors are missing, too many or of another shape, and
    Unsupported for a quantization that cannot be read.
    """
    checkpoint = Checkpoint(folder)
    names = [name for name in checkpoint.names() if not name.endswith(_NOT_WEIGHTS)]
    config = AutoConfig.from_pretrained(folder)
    layout, quantized = None, list[str]()
    if quantization := checkpoint.config.get("quantization_config"):
        layout = formats.of(quantization)
        quantized = layout.linears(names)
        if not quantized:
            raise BadInput(f"{folder}: its config says quantized, but no layer is.")
        del config.quantization_config
    # Other attentions of transformers leave out the cap on scores (Gemma 2).
    capped = getattr(config, "attn_logit_softcapping", None)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config,
        dtype=config.dtype or torch.bfloat16,
        attn_implementation="eager" if capped else None,
    )
    if (folder / "generation_config.json").is_file():
        # Where an answer ends may be said there only.
        model.generation_config = GenerationConfig.from_pretrained(folder)
    packed = set(quantized)
    plain = [
        name for name in names if name.endswith(".bias") or name.rpartition(".")[0] not in packed
    ]
    take_apart(model)
    state = model.state_dict()  # the model's own tensors, so copying into them fills it
    family = FAMILIES.get(str(config.model_type))
    place_of = family.in_module if family else str
    found = {*plain, *(f"{prefix}.weight" for prefix in quantized)}
    _check_names(folder, state, {place_of(name) for name in found}, config)
    for name in plain:
        _copy(state[place_of(name)], checkpoint.get(name), f"{folder}: {name}")
    if layout is not None:
        for prefix in quantized:
            weight_OI = layout.read(prefix, checkpoint.get).dequantize()
            _copy(state[place_of(f"{prefix}.weight")], weight_OI, f"{folder}: {prefix}")
            scheme = layout.scheme_of(prefix)
            if scheme.activation_bits == 8:
                hook = partial(_round_input, floating=scheme.grid.floating)
                model.get_submodule(place_of(prefix)).register_forward_pre_hook(hook)
    return model.eval()


def logprobs(folder: Path, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Natural, of each prompt's token ids but the first. Raises as `load` does."""
    return logprobs_of(load(folder), prompts)


@torch.inference_mode()
def logprobs_of(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The same of a model that is loaded already."""
    found = []
    for ids in prompts:
        steps_TV = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(dim=-1)
        found.append(steps_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
    return found


def _check_names(
    folder: Path, state: dict[str, Tensor], found: set[str], config: AutoConfig
) -> None:
    missing = state.keys() - found
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")  # a tied head has no tensor of its own
    unexpected = found - state.keys()
    if missing or unexpected:
        raise BadInput(
            f"{folder}: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]} tensors."
        )


def _copy(place: Tensor, tensor: Tensor, what: str) -> None:
    if place.shape != tensor.shape:
        raise BadInput(f"{what} is {tuple(tensor.shape)}, but the model has {tuple(place.shape)}.")
    place.copy_(tensor)


def _round_input(
    module: torch.nn.Module, inputs: tuple[Tensor, ...], *, floating: bool
) -> tuple[Tensor, ...]:
    return (round_activations(inputs[0], floating=floating), *inputs[1:])
