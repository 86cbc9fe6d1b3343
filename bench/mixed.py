"""What mixed precision buys: KL divergence at 4.5 bits a weight, over that of plain 4 bits.

    python bench/mixed.py [--seeds 3] [--bits 4.5] [--model DIR] [--quick]

The demo model, full calibration, for each seed of the calibration text's order: 4 bits in groups of
128, in groups of 32 (which is 4.5 bits too), and mixed. KL by simulation on the held-out text, full
vocabulary. One pair is noisy (a tenth or two); the geometric mean of the seeds counts. Ends in one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from packhorse.quantize.calibration.dataset import read_texts
from packhorse.quantize.quality import divergence
from packhorse.quantize.run import run
from packhorse.quantize.settings import Settings

DEMO = Path(__file__).resolve().parent.parent / "demo"
GOAL = 0.60
LITTLE: dict[str, Any] = {"calibration_tokens": 8192, "force": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--quick", action="store_true", help="one seed, little text")
    options = parser.parse_args()
    kinds: dict[str, dict[str, Any]] = {
        "groups of 128": {},
        "groups of 32": {"group_size": 32},
        "mixed": {"bits": options.bits},
    }
    texts = read_texts(
        DEMO / "eval/held_out_text.jsonl", AutoTokenizer.from_pretrained(options.model)
    )
    more = LITTLE if options.quick else {}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="packhorse-mixed-") as place:
        for seed in range(1 if options.quick else options.seeds):
            for kind, how in kinds.items():
                out = Path(place) / f"{kind}-{seed}".replace(" ", "-")
                settings = Settings(
                    str(options.model), out, "gptq", quality=False, verify=False, seed=seed,
                    calibration=DEMO / "calibration.jsonl", **more, **how,
                )  # fmt: skip
                report = run(settings, lambda *_: lambda _: None)
                sizes[kind] = report.bytes_after
                found[kind].append(divergence.between(options.model, out, texts)["kl_mean"])
                print(f"seed {seed}, {kind}: KL {found[kind][-1]:.5f}", file=sys.stderr)
    ratios = {
        kind: [mixed / plain for mixed, plain in zip(found["mixed"], found[kind], strict=True)]
        for kind in ("groups of 128", "groups of 32")
    }
    mean = {kind: round(statistics.geometric_mean(some), 3) for kind, some in ratios.items()}
    print(
        json.dumps(
            {
                "bits": options.bits, "kl": found, "bytes": sizes, "mixed over": mean,
                "each": {kind: [round(one, 3) for one in some] for kind, some in ratios.items()},
                "goal": GOAL, "met": mean["groups of 128"] <= GOAL,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
