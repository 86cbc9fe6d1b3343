"""How far roundings alone move log-probabilities: what a test may allow an engine, on any CPU.

An engine and a reference that round at other places are as far apart as two samples of the same
noise. The noise is measured by a model that rounds against one that does not, so the limit follows
from the widths in play and from the model, not from the machine that ran the test first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.quality import dequantized
from packhorse.quantize.quality.evaluate import apart

FLOAT8 = torch.float8_e4m3fn
UNKNOWN = 2
"""Kernels round in places that the simulation does not know: scores, probabilities, parts of sums.
As much again is allowed for that. Codes that are wrong by one step are ten times as far off.
"""
_FLAGS = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
# Without it oneDNN adds pairs of 8-bit products in 16 bits, which saturate: as much noise again as
# rounding the activations is (docs/lab-log.md).
_NARROWED = os.environ.get("ONEDNN_MAX_CPU_ISA") in ("SSE41", "AVX", "AVX2", "AVX512_CORE")
VNNI = not _NARROWED and not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(_FLAGS)


def allowed(
    folder: Path, prompts: Sequence[Sequence[int]], *, eight_bit_cache: bool = False
) -> float:
    """The mean difference, in nats, that an engine and a reference, both in bfloat16, may have: the
    noise of each, added. With an 8-bit cache the engine rounds keys and values too, with the
    checkpoint's scales.
    """
    exact = dequantized.logprobs_of(dequantized.load(folder).float(), prompts)
    reference = dequantized.logprobs(folder, prompts)
    model = dequantized.load(folder)
    if eight_bit_cache:
        _round_keys_and_values(model, folder)
    engine = dequantized.logprobs_of(model, prompts)
    noise = _mean(exact, reference) + _mean(exact, engine)
    return (UNKNOWN if VNNI else 2 * UNKNOWN) * noise


def _mean(one: list[list[float]], other: list[list[float]]) -> float:
    found = [value for pair in zip(one, other, strict=True) for value in apart(*pair)]
    return sum(found) / len(found)


def _round_keys_and_values(model: Any, folder: Path) -> None:
    """Before rotation, not after: the size of the error is the same."""
    checkpoint = Checkpoint(folder)
    names = set(checkpoint.names())
    for name, module in model.named_modules():
        part = name.rpartition(".")[2]
        if part not in ("k_proj", "v_proj"):
            continue
        scale_name = f"{name.rpartition('.')[0]}.{part[0]}_scale"
        scale = float(checkpoint.get(scale_name)) if scale_name in names else 1.0

        def hook(_: Any, __: Any, out: Tensor, scale: float = scale) -> Tensor:
            limit = torch.finfo(FLOAT8).max
            return (out / scale).clamp(-limit, limit).to(FLOAT8).to(out.dtype) * scale

        module.register_forward_hook(hook)
