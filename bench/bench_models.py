"""The benches' model: a random Llama of 25 million parameters, in bfloat16 and in 4 bits.

Random weights cost an engine what trained ones do, and the demo's model is so small that nothing
but the servers would be measured. What it answers means nothing. Tokenizer and chat template are
the demo's. Folders that are already there are used again; the seed is fixed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo/model"
SIDE_FILES = (
    "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


def random_llama(
    folder: Path, *, hidden: int = 512, layers: int = 8, heads: int = 8, kv_heads: int = 4,
    intermediate: int = 1408, max_position_embeddings: int = 512, seed: int = 0,
) -> Path:  # fmt: skip
    """Make the bfloat16 checkpoint unless it is there. For 4 bits, sizes are multiples of 128."""
    if folder.exists():
        return folder
    import torch
    from safetensors.torch import save_file

    vocab = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    head_dim = hidden // heads

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    tensors = {"model.embed_tokens.weight": random(vocab, hidden), "model.norm.weight": ones()}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        tensors |= {f"{start}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{start}.{name}.weight"] = ones()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocab, "max_position_embeddings": max_position_embeddings,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    # Made elsewhere and renamed: a half-made folder is not taken for a whole one.
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    save_file(tensors, making / "model.safetensors", metadata={"format": "pt"})
    (making / "config.json").write_text(json.dumps(config, indent=2))
    for name in SIDE_FILES:
        shutil.copy(DEMO_MODEL / name, making / name)
    making.rename(folder)
    return folder


def four_bit_llama(work_folder: Path) -> Path:
    """The same model rounded to 4 bits, as `quantize model --method rtn` makes it."""
    folder = work_folder / "llama-25m-rtn"
    if not folder.exists():
        quantize = Path(sys.executable).parent / "quantize"
        base = random_llama(work_folder / "llama-25m")
        command = [
            str(quantize), "model", str(base), "--method", "rtn", "--no-quality", "--no-verify",
            "--out", str(folder),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder
