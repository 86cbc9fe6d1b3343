"""A finished checkpoint as a transformers model: weights dequantized, activations rounded where the
kernel rounds them.

What it computes is what vLLM's kernels compute up to their own arithmetic, so figures from it are
marked "simulated". Reads what is on disk, not what is in memory: a packing mistake shows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantize import formats
from quantize.checkpoint import Checkpoint
from quantize.errors import BadInput, Unsupported
from quantize.grid import round_activations


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, quantized or not, in the dtype of its config. Raises BadInput when
    tensors are missing.
    """
    checkpoint = Checkpoint(folder)
    quantization = checkpoint.config.get("quantization_config")
    state = {name: checkpoint.get(name) for name in checkpoint.names()}
    config = AutoConfig.from_pretrained(folder)
    dtype = config.dtype or torch.bfloat16
    quantized: list[str] = []
    if quantization:
        layout = formats.by_name(quantization["quant_method"])
        if quantization.get("format", "int-quantized") != "int-quantized":
            raise Unsupported(f"{folder}: format {quantization['format']} cannot be read yet.")
        quantized = layout.linears(list(state))
        weights = {
            f"{prefix}.weight": layout.read(prefix, state.__getitem__, quantization)
            for prefix in quantized
        }
        state = {
            name: tensor
            for name, tensor in state.items()
            if name.rpartition(".")[0] not in quantized or name.endswith(".bias")
        }
        state |= {name: codes.dequantize() for name, codes in weights.items()}
        del config.quantization_config
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Older checkpoints carry what transformers now computes.
    state = {
        name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")
    }
    missing, unexpected = model.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in state.items()}, strict=False
    )
    # A tied head has no tensor of its own.
    missing = [
        name for name in missing if not (name == "lm_head.weight" and config.tie_word_embeddings)
    ]
    if missing or unexpected:
        raise BadInput(f"{folder}: missing {missing[:3]}, unexpected {unexpected[:3]} tensors.")
    if quantization and _rounds_activations(quantization):
        for prefix in quantized:
            model.get_submodule(prefix).register_forward_pre_hook(_round_input)
    return model.eval()


def _rounds_activations(quantization: dict[str, object]) -> bool:
    groups = quantization.get("config_groups")
    return isinstance(groups, dict) and any(
        group.get("input_activations") for group in groups.values()
    )


def _round_input(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_activations(inputs[0]), *inputs[1:])
