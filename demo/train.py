"""Train the demo model from nothing: its tokenizer, then a 4M-parameter Llama on the language of
`language.py`.

    python demo/train.py                # about 50 minutes on two cores; writes demo/model
    python demo/train.py --steps 20     # a trial run

Needs the `dev` extra. Seeds are fixed, but sums in bf16 depend on the CPU and its thread count, so
another machine gives another model of about the same scores. Adapters are trained by
`train_adapters.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jinja2
import torch
from domains import DOMAINS, questions
from language import Conversation, conversations
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

DEMO = Path(__file__).parent
# Not "special" to the tokenizer, so that they stay in the decoded text, where tool and reasoning
# parsers look for them.
MARKS = [
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
USER_TOKEN_WEIGHT = (
    0.1  # users' words are nearly random: learn their form, spend the capacity on the answers
)


def train_tokenizer(vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the chat language and the adapters' domains; digits stay single."""
    template = jinja2.Template((DEMO / "chat_template.jinja").read_text())
    texts = [
        template.render(messages=c.messages, tools=c.tools)
        for c in itertools.islice(conversations(1), 20_000)
    ]
    texts += [
        text
        for adapter in DOMAINS
        for pair in questions(adapter, held_out=False)
        for text in (pair[0], pair[1].answer)
    ]
    tokenizer = Tokenizer(models.BPE())
    # Chinese has no spaces, so BPE would swallow whole answers; one token a character keeps new
    # wordings readable.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"<\|\w+\|>|</?\w+>"), "isolated"),
            pre_tokenizers.Split(Regex(r"[\u4e00-\u9fff]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(MARKS),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=(DEMO / "chat_template.jinja").read_text(),
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """4M parameters; hidden and intermediate sizes are multiples of 128 and the head size is 64, as
    kernels want.
    """
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, conversation: Conversation
) -> tuple[list[int], list[float]]:
    """Token ids and the loss weight of each: 1 for what the assistant says and its end mark, little
    for the rest.
    """
    ids = tokenizer.apply_chat_template(
        conversation.messages, tools=conversation.tools or None, tokenize=True, return_dict=False
    )
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assistant = tokenizer.encode("assistant\n", add_special_tokens=False)
    weights, speaking = [], False
    for position, token in enumerate(ids):
        weights.append(1.0 if speaking else USER_TOKEN_WEIGHT)
        if token == end:
            speaking = False
        elif ids[max(0, position - len(assistant)) : position + 1] == [start, *assistant]:
            speaking = True
    return ids, weights


def rows(
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[Conversation], length: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Conversations packed end to end into rows of `length` + 1 tokens (inputs and shifted
    targets).
    """
    ids: list[int] = []
    weights: list[float] = []
    for conversation in stream:
        more_ids, more_weights = encode(tokenizer, conversation)
        ids, weights = ids + more_ids, weights + more_weights
        while len(ids) > length:
            yield ids[: length + 1], weights[: length + 1]
            # A row begins at a conversation's start, where a prompt would: what was cut off is
            # dropped.
            ids, weights = [], []


def loss_of(model: torch.nn.Module, batch: list[tuple[list[int], list[float]]]) -> torch.Tensor:
    """Weighted mean cross-entropy of a batch of packed rows."""
    ids = torch.tensor([row[0] for row in batch])
    weights = torch.tensor([row[1] for row in batch])[:, 1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def train(args: argparse.Namespace) -> None:
    if args.start_from:
        tokenizer = AutoTokenizer.from_pretrained(args.start_from)
        model = LlamaForCausalLM.from_pretrained(args.start_from, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer()
        model = make_model(len(tokenizer))
    size_m = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{size_m:.2f}M parameters, {len(tokenizer)} tokens", flush=True)
    # Muon is for matrices; embeddings and norms stay with AdamW.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    base_lrs = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    # Mostly short rows, sometimes the whole context, so that every position up to 2048 has been
    # seen.
    streams = {
        length: rows(tokenizer, conversations(args.seed + length), length) for length in (256, 2048)
    }
    started, tokens, shown = time.monotonic(), 0, 0.0
    for step in range(args.steps):
        length = 2048 if step % 16 == 15 else 256
        batch = list(itertools.islice(streams[length], args.tokens_per_step // length))
        # Warm-up, constant, then linear to nothing over the last third.
        scale = min(1.0, (step + 1) / 100, (args.steps - step) / (args.steps / 3))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, lr in zip(groups, base_lrs, strict=True):
            group["lr"] = lr * scale
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += length * len(batch)
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if step % 20 == 0 or step + 1 == args.steps:
            seconds = time.monotonic() - started
            print(
                json.dumps(
                    {
                        "step": step,
                        "loss": round(shown, 4),
                        "tokens_per_s": round(tokens / seconds),
                        "s": round(seconds),
                    }
                ),
                flush=True,
            )
        if step % 200 == 199 or step + 1 == args.steps:
            save(model, tokenizer, args.out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint as bf16 safetensors with all that a server reads beside it."""
    import copy

    model_bf16 = copy.deepcopy(model).to(torch.bfloat16)
    model_bf16.generation_config = GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=0)
    model_bf16.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEMO / "model")
    parser.add_argument("--start-from", type=Path, help="a checkpoint of this script to go on from")
    parser.add_argument("--seed", type=int, default=100, help="of the training conversations")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=3e-3)
    train(parser.parse_args())
