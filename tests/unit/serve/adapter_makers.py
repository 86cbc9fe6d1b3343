"""Adapters for tests: a tiny base, what PEFT saves of it, and folders made by hand."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from packhorse.serve.adapters.formats import AdapterLimits, check, write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"
A0, B0 = (f"base_model.model.{Q0}.lora_{part}.weight" for part in "AB")
TOKENS = torch.arange(2, 26).reshape(2, 12)


# The sizes of the tiny model: module -> (outputs, inputs).
_SIZES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.gate_proj": (192, 128), "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}  # fmt: skip
LAYERS = {
    f"model.layers.{block}.{name}": size for block in range(3) for name, size in _SIZES.items()
}
LIMITS = AdapterLimits(16, LAYERS, 2**24)


@cache
def tiny_base() -> Any:
    """A random Llama of three blocks. Nobody changes it: PEFT wraps a copy."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@contextmanager
def peft_may_warn() -> Iterator[None]:
    """PEFT 0.21 warns of modules whose ranks are all pruned, reads the keys of AdaLoRA's own
    rank_pattern as LoRA's, and has its doubts about much of what is refused here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        yield


def wrapped(config: Any) -> Any:
    with peft_may_warn():
        return get_peft_model(copy.deepcopy(tiny_base()), config)


def save(model: Any, folder: Path) -> Path:
    with peft_may_warn():
        model.save_pretrained(folder)
    return folder


def lora(folder: Path, **settings: Any) -> Path:
    """A saved LoRA whose B is random too, so that it changes something."""
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False,
                "lora_alpha": 6, **settings}  # fmt: skip
    return save(wrapped(LoraConfig(**settings)), folder)


def adalora(folder: Path, *, prune: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """Trained for a few steps, in which most ranks are pruned."""
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=6, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6, lora_alpha=12,
        target_modules=LINEARS,
    )  # fmt: skip
    model = wrapped(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for step in range(6 if prune else 1):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return save(model.to(dtype), folder)


def loaded(base: Any, folder: Path) -> Any:
    with peft_may_warn():
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def deltas(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each module's weight, computed by PEFT."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in loaded(base, folder).named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A
    }


def logits(base: Any, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = loaded(base, folder)(TOKENS).logits
    return values


def copied(source: Path, limits: AdapterLimits, folder: Path) -> tuple[Path, str, int]:
    folder.mkdir()
    written = write(check(source, limits), folder)
    return folder, written.digest, written.rank


def edit(folder: Path, **values: Any) -> Path:
    """Change adapter_config.json."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def made(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """An adapter by hand: rank 4 on one module of the tiny checkpoint."""
    folder.mkdir(exist_ok=True)
    if tensors is None:
        tensors = {A0: torch.ones(4, 128), B0: torch.ones(128, 4)}
    save_file(dict(tensors), folder / WEIGHTS)
    document = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps({**document, **config}))
    return folder


def ada(rows: int = 3, **config: Any) -> dict[str, Any]:
    shapes = {"A": (rows, 128), "B": (128, rows), "E": (rows, 1)}
    tensors = {f"base_model.model.{Q0}.lora_{part}": torch.ones(s) for part, s in shapes.items()}
    return {"tensors": tensors, "peft_type": "ADALORA", "init_r": 3, **config}


def renamed(*, a: str = A0, b: str = B0, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {a: torch.ones(4, 128), b: torch.ones(128, 4), **more}
