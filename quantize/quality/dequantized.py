"""A finished checkpoint as a transformers model: weights are dequantized, and activations are
rounded where vLLM's kernel rounds them.

The model computes what vLLM's kernels compute, up to their own arithmetic, so figures from it are
called "simulated". It is read from disk, so that a mistake in packing shows. Checkpoints of other
tools can be read, too.

Not simulated: an 8-bit KV cache, and kernels that round the activations of a weight-only scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from packhorse.quantize import formats
from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.experts import unfuse_experts
from packhorse.quantize.model.families import FAMILIES
from packhorse.quantize.numerics.grid import round_activations

# Scales of the KV cache, and buffers that transformers computes itself.
_NOT_WEIGHTS = (".k_scale", ".v_scale", ".q_scale", "rotary_emb.inv_freq")


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, quantized or not, in the dtype of its config. Dequantizes one layer at
    a time. Raises BadInput for missing or unexpected tensors and for wrong shapes, Unsupported for
    a quantization that cannot be read.
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
    # Of transformers' attention functions, only eager caps the scores (Gemma 2).
    capped = getattr(config, "attn_logit_softcapping", None)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config,
        dtype=config.dtype or torch.bfloat16,
        attn_implementation="eager" if capped else None,
    )
    if (folder / "generation_config.json").is_file():
        # The tokens that end an answer may be given only there.
        model.generation_config = GenerationConfig.from_pretrained(folder)
    packed = set(quantized)
    plain = [
        name for name in names if name.endswith(".bias") or name.rpartition(".")[0] not in packed
    ]
    unfuse_experts(model)
    state = model.state_dict()  # the model's own tensors: copying into them fills the model
    family = FAMILIES.get(str(config.model_type))
    in_module = family.in_module if family else str
    found = {*plain, *(f"{prefix}.weight" for prefix in quantized)}
    _check_names(folder, state, {in_module(name) for name in found}, config)
    for name in plain:
        _copy(state[in_module(name)], checkpoint.get(name), f"{folder}: {name}")
    if layout is not None:
        for prefix in quantized:
            weight_OI = layout.read(prefix, checkpoint.get).dequantize()
            _copy(state[in_module(f"{prefix}.weight")], weight_OI, f"{folder}: {prefix}")
            scheme = layout.scheme_of(prefix)
            if scheme.activation_bits == 8:
                hook = partial(_round_input, floating=scheme.weights.floating)
                model.get_submodule(in_module(prefix)).register_forward_pre_hook(hook)
    return model.eval()


def logprobs(folder: Path, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Natural log-probabilities of each prompt's tokens but the first. Raises as `load` does."""
    return logprobs_of(load(folder), prompts)


@torch.inference_mode()
def logprobs_of(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The same for a loaded model."""
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


def _copy(target: Tensor, tensor: Tensor, what: str) -> None:
    if target.shape != tensor.shape:
        raise BadInput(f"{what} is {tuple(tensor.shape)}, but the model has {tuple(target.shape)}.")
    target.copy_(tensor)


def _round_input(
    module: torch.nn.Module, inputs: tuple[Tensor, ...], *, floating: bool
) -> tuple[Tensor, ...]:
    return (round_activations(inputs[0], floating=floating), *inputs[1:])
