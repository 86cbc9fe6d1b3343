"""The identity of a run: everything that the bytes of its result depend on.

output/workspace.py stores it with the finished steps, and resumes only a run with the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from packhorse.quantize.calibration.statistics import TOKENS_AT_ONCE
from packhorse.quantize.calibration.text import Calibration
from packhorse.quantize.model.checkpoint import Checkpoint, sha256_of
from packhorse.quantize.numerics.grid import Scheme
from packhorse.quantize.plan.plan import Plan

FROM_PLAN = (
    "method",
    "scheme",
    "format",
    "group_size",
    "symmetric",
    "kv_scales",
    "converted_to",
    "budget",
    "ignored",
)


def identity_of(
    source: Checkpoint,
    planned: Plan,
    text: Calibration | None,
    *,
    keep: Sequence[str],
    seed: int,
    device: torch.device,
    versions: dict[str, str],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Plain data for JSON. `versions` are those of packages; `advance` is called with each weight
    file that was hashed. The keys and the texts of schemes are those of earlier versions, whose
    runs can be resumed.
    """
    digests = {}
    for path in source.weight_files():
        digests[path.name] = sha256_of([path])
        advance(1)
    decided = planned.as_json()
    return {
        **{key: decided[key] for key in FROM_PLAN},
        "weights": digests,
        "config": source.config,
        "calibration": None if text is None else text.as_json(),
        "keep": list(keep),
        "choices": [_scheme_text(scheme) for scheme in planned.choices],
        "side files": sha256_of([source.folder / name for name in source.side_files()]),
        "calibration rows": None if text is None else text.digest,
        "seed": seed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "tokens at once": TOKENS_AT_ONCE,
        **versions,
    }


def _scheme_text(scheme: Scheme) -> str:
    args = scheme.weights
    return (
        f"Scheme(grid=Grid(bits={args.bits}, group_size={args.group_size}, "
        f"symmetric={args.symmetric}, floating={args.floating}), "
        f"activation_bits={scheme.activation_bits})"
    )
