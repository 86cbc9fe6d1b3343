"""Peak memory of quantizing, by depth: random models of hidden size 2048 with 4, 8 and 16 blocks.

    python bench/memory.py [--tokens 16384] [--blocks 4 8 16] [--quick]

Each run is a process of its own. Memory is what the process holds beyond what it held once all was
imported: resident, files it reads included, the most of it at any time (VmHWM). It is held against
one block in float32 plus activations: both models' hidden states (float32) and what the original's
layers are given (bfloat16). Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_models import random_llama

HIDDEN, INNER = 2048, 5632
GOALS = {"over block and activations": 1.5, "deepest over shallowest": 1.1}
CALIBRATION = Path(__file__).resolve().parent.parent / "demo/calibration.jsonl"


def status(key: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def child(folder: Path, out: Path, tokens: int) -> None:
    """Quantize, and print the memory that it took."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from packhorse.quantize.run import run
    from packhorse.quantize.settings import Settings

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    settings = Settings(
        str(folder), out, "gptq", quality=False, verify=False, calibration=CALIBRATION,
        calibration_tokens=tokens, force=True,
    )  # fmt: skip
    report = run(settings, lambda *_: lambda _: None)
    found = {"seconds": round(report.seconds), "planned": report.plan["estimates"]}
    print(json.dumps({**found, "peak": status("VmHWM") - before}))


def measure(blocks: int, tokens: int, place: Path) -> dict[str, Any]:
    folder = place / f"blocks-{blocks}"
    random_llama(
        folder, hidden=HIDDEN, layers=blocks, heads=16, kv_heads=8, intermediate=INNER
    )  # fmt: skip
    command = [sys.executable, __file__, "--child", folder, place / "out", "--tokens", tokens]
    result = subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    subprocess.run(["rm", "-r", str(folder), str(place / "out")], check=True)
    print(f"{blocks} blocks: {found}", file=sys.stderr)
    return found


def expected(tokens: int) -> int:
    """Bytes of one block and activations."""
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2
    block = 4 * (attention + 3 * HIDDEN * INNER)
    hidden = 2 * 4 * tokens * HIDDEN
    given = 2 * tokens * (5 * HIDDEN + INNER)  # three groups and two norms; the last layer
    return block + hidden + given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--quick", action="store_true", help="1 and 2 blocks, 2048 tokens")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.tokens)
        return
    tokens, depths = (2048, [1, 2]) if options.quick else (options.tokens, options.blocks)
    with tempfile.TemporaryDirectory(prefix="packhorse-memory-") as place:
        found = {blocks: measure(blocks, tokens, Path(place)) for blocks in depths}
    peaks = {blocks: one["peak"] for blocks, one in found.items()}
    ratios = {
        "over block and activations": round(max(peaks.values()) / expected(tokens), 3),
        "deepest over shallowest": round(peaks[max(peaks)] / peaks[min(peaks)], 3),
    }
    print(
        json.dumps(
            {
                "tokens": tokens, "peak_bytes": peaks, "block_and_activations": expected(tokens),
                "ratios": ratios, "goals": GOALS,
                "met": {name: ratios[name] <= goal for name, goal in GOALS.items()},
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
