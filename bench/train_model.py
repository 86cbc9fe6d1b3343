"""The larger model of `quantize_peers.py`: a Llama of 9 million block parameters that reads Python.

    python bench/train_model.py --work-folder W    # about 20 minutes on one quiet core, once

Trained on real text that every machine with this project has: sources and documentation of the
running interpreter and of the installed torch and transformers. Files are taken in the order of a
hash of their path, and every 16th is held out, so nothing that is measured was trained on. Seeds
are fixed, but other versions of those packages give other text, and so a like model, not the same.

Writes W/larger: model/ (bfloat16, its own tokenizer), calibration.jsonl (trained-on text),
eval/held_out_text.jsonl, eval/cloze.jsonl and training.json, laid out as the demo is. A folder
that is there is used again. The cloze asks for what Python's grammar or the line itself decides:
`self` after `def f(`, the second `name` of `name=name`; see CLOZES.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROW_TOKENS = 256
ENDINGS = (".py", ".rst", ".txt", ".md")
# Tables and test data are no language; bytes are capped so that no source drowns the others.
SOURCES = (
    ("stdlib", ".", 8_000_000, ("test", "tests", "site-packages", "encodings", "pydoc_data")),
    ("purelib", "transformers", 9_000_000, ("tests",)),
    ("purelib", "torch", 6_000_000, ("_inductor", "testing", "include", "test")),
)
HOLD_OUT = 16
CHUNK_CHARS = 850
CHUNKS_OF_A_FILE = 6
HELD_OUT_CHUNKS = 240
CALIBRATION_CHUNKS = 600
CLOZES_OF_A_KIND = 60
# Pattern -> the group "answer" is asked for, from what stands before it.
CLOZES = {
    "self": r"\n +def \w+\((?P<answer>self)\b",
    "keyword": r"[(,] ?(?P<name>[a-z_]{4,})=(?P<answer>(?P=name))[,)]",
    "attribute": r"self\.(?P<name>\w{4,}) =(?P<answer> (?P=name))\n",
    "items": r"for \w+, \w+ in \w+\.(?P<answer>items)\(",
    "import": r"\nfrom [\w.]+(?P<answer> import) ",
    "in": r"\n +for \w+(?P<answer> in) ",
    "init": r"super\(\)\.(?P<answer>__init__)\(",
    "none": r"is not(?P<answer> None)\b",
    "default": r"\w: \w+ \| None =(?P<answer> None)\b",
    "as": r"\n +with [^\n]+\)(?P<answer> as) ",
}


def files() -> tuple[list[str], list[str]]:
    """(training, held-out) texts, in an order that only the paths decide."""
    kept: tuple[list[str], list[str]] = ([], [])
    for scheme, package, limit_bytes, left_out in SOURCES:
        root = Path(sysconfig.get_path(scheme)) / package
        found = []
        for path in sorted(root.rglob("*")):
            parts = path.relative_to(root).parts
            if path.suffix in ENDINGS and not set(parts) & set(left_out) and path.is_file():
                name = "/".join((scheme, package, *parts))
                found.append((hashlib.sha256(name.encode()).hexdigest(), path))
        taken_bytes = 0
        for place, (_, path) in enumerate(sorted(found)):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if not 400 < len(text) < 300_000:
                continue
            taken_bytes += len(text)
            if taken_bytes > limit_bytes:
                break
            kept[place % HOLD_OUT == 0].append(text)
    # Sources mixed: else the last of them would be all that the end of the training sees.
    train, held_out = (sorted(texts, key=_hash) for texts in kept)
    return train, held_out


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def train_tokenizer(texts: list[str], *, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a sample of the texts is enough to learn its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=ROW_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """9.4M parameters in the blocks; every layer's inputs are a multiple of 128."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=ROW_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[torch.Tensor]:
    """int64 (ROW_TOKENS + 1), texts end to end; over again when they are used up."""
    left: list[int] = []
    while True:
        for text in texts:
            left += [*tokenizer.encode(text, verbose=False), tokenizer.eos_token_id]
            while len(left) > ROW_TOKENS:
                yield torch.tensor(left[: ROW_TOKENS + 1])
                left = left[ROW_TOKENS:]


def batches(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], batch_rows: int
) -> Iterator[torch.Tensor]:
    """int64 (batch_rows, ROW_TOKENS + 1). Each place in the batch reads files of its own: rows of
    one file are too alike to learn from at once.
    """
    streams = [rows(tokenizer, texts[place::batch_rows]) for place in range(batch_rows)]
    while True:
        yield torch.stack([next(stream) for stream in streams])


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train(model: LlamaForCausalLM, stream: Iterator[torch.Tensor], steps: int) -> None:
    # Muon is for matrices; embeddings and norms stay with AdamW. As demo/train.py.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    peak = 2e-3
    optimizers = [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    started_s, smooth = time.monotonic(), 0.0
    for step in range(steps):
        # Warm-up, then a cosine down to a twentieth.
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 60) * cosine
        batch = next(stream)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        if step % 20 == 0 or step + 1 == steps:
            took_s = time.monotonic() - started_s
            speed = (step + 1) * batch[:, 1:].numel() / took_s
            line = (
                f"step {step} of {steps}: loss {smooth:.3f}, {speed:.0f} tokens/s, {took_s:.0f} s"
            )
            print(f"{line}, {took_s:.0f} s", file=sys.stderr, flush=True)


def chunks(texts: list[str], count: int) -> list[str]:
    """Pieces of whole lines from the beginning, the middle and the end of files."""
    found: list[str] = []
    for text in texts:
        step = max(CHUNK_CHARS, len(text) // CHUNKS_OF_A_FILE)
        for start in range(0, len(text) - 200, step):
            piece = text[start : start + CHUNK_CHARS]
            found.append(piece[piece.find("\n") + 1 :] if start else piece)
    return sorted((piece for piece in found if len(piece) > 200), key=_hash)[:count]


def clozes(texts: list[str]) -> list[dict[str, Any]]:
    """{"text", "start", "kind"}: the answer is the text from character `start` to its end."""
    found = []
    for kind, pattern in CLOZES.items():
        some = [
            {"text": text[max(0, m.start("answer") - 600) : m.end("answer")], "kind": kind,
             "answer": m["answer"]}
            for text in texts for m in re.finditer(pattern, text)
        ]  # fmt: skip
        some.sort(key=lambda cloze: _hash(cloze["text"]))
        for cloze in some[:CLOZES_OF_A_KIND]:
            start = len(cloze["text"]) - len(cloze.pop("answer"))
            found.append({**cloze, "start": start})
    return found


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Any, pieces: list[str]) -> float:
    total, count = 0.0, 0
    for piece in pieces:
        row = torch.tensor([tokenizer.encode(piece)[: ROW_TOKENS + 1]])
        total += loss_of(model, row).item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    return total / count


def larger_model(work_folder: Path, *, steps: int = 850, batch_rows: int = 8) -> Path:
    """The folder of the model and its files; trains it when it is not there."""
    folder = work_folder / "larger"
    if folder.exists():
        return folder
    started_s = time.monotonic()
    train_texts, held_out = files()
    tokenizer = train_tokenizer(train_texts)
    model = make_model(len(tokenizer))
    train(model, batches(tokenizer, train_texts, batch_rows), steps)
    pieces = chunks(held_out, HELD_OUT_CHUNKS)
    model.eval().to(torch.bfloat16)
    loss = held_out_loss(model, tokenizer, pieces)
    questions = clozes(held_out)
    record = {
        "block_parameters": sum(p.numel() for p in model.model.layers.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": steps * batch_rows * ROW_TOKENS,
        "training_text_bytes": sum(len(text.encode()) for text in train_texts),
        "held_out_perplexity": round(math.exp(loss), 3),
        "uniform_perplexity": len(tokenizer),
        "clozes": len(questions),
        "seconds": round(time.monotonic() - started_s),
        "cpu_seconds": round(time.process_time()),
    }
    # Made elsewhere and renamed: a half-made folder is not taken for a whole one.
    work_folder.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=work_folder))
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(making / "model")
    tokenizer.save_pretrained(making / "model")
    calibration = [{"text": piece} for piece in chunks(train_texts, CALIBRATION_CHUNKS)]
    _write_lines(making / "calibration.jsonl", calibration)
    _write_lines(making / "eval/held_out_text.jsonl", [{"text": piece} for piece in pieces])
    _write_lines(making / "eval/cloze.jsonl", questions)
    (making / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.move(making, folder)
    print(json.dumps(record), file=sys.stderr, flush=True)
    return folder


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work-folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=850)
    arguments = parser.parse_args()
    larger_model(arguments.work_folder, steps=arguments.steps)
