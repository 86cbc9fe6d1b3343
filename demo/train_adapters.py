"""Train the demo's adapters with PEFT on facts that the base model does not know.

    python demo/train_adapters.py               # all, about 3 minutes each on two cores
    python demo/train_adapters.py clinic code   # some

clinic, ledger, code   LoRA of rank 8 on the bf16 base
clinic-v2              the same questions as clinic, other answers
code-qlora             LoRA trained in the QLoRA way: the frozen base is the 4-bit one, dequantized
ledger-adalora         AdaLoRA, ranks from 12 down to a mean of 8
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from domains import ADAPTERS, questions
from language import Conversation, Words
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from train import DEMO, encode, loss_of
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from packhorse.quantize.quality import dequantized
from packhorse.quantize.run import run
from packhorse.quantize.settings import Settings

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS, ROW_TOKENS = 16, 256


def base_of(adapter: str) -> PreTrainedModel:
    """The frozen model under the adapter, in float32 so that small updates count."""
    if not adapter.endswith("-qlora"):
        return dequantized.load(DEMO / "model").float()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rtn"
        run(
            Settings(str(DEMO / "model"), out, "rtn", quality=False, verify=False),
            lambda label, steps: lambda done: None,
        )
        return dequantized.load(out).float()


def wrap(base: PreTrainedModel, adapter: str, steps: int) -> PeftModel:
    common = {"task_type": TaskType.CAUSAL_LM, "target_modules": LINEARS, "lora_alpha": 16}
    if adapter.endswith("-adalora"):
        config = AdaLoraConfig(
            init_r=12,
            target_r=8,
            tinit=steps // 10,
            tfinal=steps // 3,
            deltaT=5,
            total_step=steps,
            **common,
        )
    else:
        config = LoraConfig(r=8, lora_dropout=0.0, **common)
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = "demo/model"
    return model


def batches(
    adapter: str, tokenizer: PreTrainedTokenizerFast
) -> Iterator[list[tuple[list[int], list[float]]]]:
    """Endless: every question in every training wording, shuffled anew each time round, packed."""
    rng = random.Random(17)
    words = Words(rng, held_out=False)
    pairs = questions(adapter, held_out=False)
    ids: list[int] = []
    weights: list[float] = []
    rows: list[tuple[list[int], list[float]]] = []
    while True:
        rng.shuffle(pairs)
        for text, fact in pairs:
            asked = words.dress(text) if fact.language == "en" else text
            messages = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": fact.answer},
            ]
            more_ids, more_weights = encode(tokenizer, Conversation(adapter, messages))
            if len(ids) + len(more_ids) > ROW_TOKENS + 1:
                padding = ROW_TOKENS + 1 - len(ids)
                rows.append((ids + [tokenizer.pad_token_id] * padding, weights + [0.0] * padding))
                ids, weights = [], []
                if len(rows) == ROWS:
                    yield rows
                    rows = []
            ids, weights = ids + more_ids, weights + more_weights


def train(adapter: str, steps: int, lr: float) -> None:
    torch.manual_seed(17)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = wrap(base_of(adapter), adapter, steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    started_s, shown = time.monotonic(), 0.0
    for step, batch in zip(range(steps), batches(adapter, tokenizer), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (steps / 2))
        loss = loss_of(model, batch)
        if adapter.endswith("-adalora"):
            # PEFT adds this by itself only when the model computes the loss.
            loss = loss + orthogonality(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if adapter.endswith("-adalora"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad(set_to_none=True)
        shown = 0.9 * shown + 0.1 * loss.item() if step else loss.item()
        if step % 50 == 0 or step + 1 == steps:
            print(
                f"{adapter} step {step} loss {shown:.4f} {time.monotonic() - started_s:.0f} s",
                flush=True,
            )
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        target = DEMO / "adapters" / adapter
        target.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(folder) / name, target / name)


def orthogonality(model: PeftModel, weight: float = 0.1) -> torch.Tensor:
    """AdaLoRA's regularizer: P and Q should be orthogonal. Source: arXiv:2303.10512, equation 4."""
    terms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            terms.append((gram - torch.eye(len(gram))).square().sum().sqrt())
    return weight * torch.stack(terms).mean()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="*", default=list(ADAPTERS), help="which; default: all")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--lr", type=float, default=4e-3)
    arguments = parser.parse_args()
    for name in arguments.adapters:
        if name not in ADAPTERS:
            parser.error(f"{name} is not an adapter of the demo; they are {', '.join(ADAPTERS)}")
        train(name, arguments.steps, arguments.lr)
