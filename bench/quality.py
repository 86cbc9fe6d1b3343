"""The demo's scores in one table and one JSON line: the base, each quantize method, each adapter.

    python bench/quality.py            # about 5 minutes on two cores

Scores are greedy exact match on demo/eval with transformers; quantized checkpoints are read back
from disk and dequantized. What the real engine answers is compared in tests/e2e.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer

from packhorse.quantize.calibration.dataset import read_texts
from packhorse.quantize.methods import METHODS
from packhorse.quantize.quality import dequantized
from packhorse.quantize.quality.evaluate import greedy_answers, perplexity, read_questions, score
from packhorse.quantize.run import run
from packhorse.quantize.settings import Settings

DEMO = Path(__file__).resolve().parent.parent / "demo"
# adapter -> the evaluation file it is for; each is also scored on the quantized bases.
ADAPTERS = {
    "clinic": "clinic", "ledger": "ledger", "code": "code", "clinic-v2": "clinic-v2",
    "code-qlora": "code", "ledger-adalora": "ledger",
}  # fmt: skip


def exact_match(model: Any, name: str) -> float:
    questions = read_questions(DEMO / f"eval/{name}.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    return score(questions, greedy_answers(model, tokenizer, questions)).as_json()["exact_match"]


def checkpoint_figures(folder: Path) -> dict[str, Any]:
    """Score and perplexity of a folder, and the score of every adapter on top of it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = read_texts(DEMO / "eval/held_out_text.jsonl", tokenizer)
    base = dequantized.load(folder)
    figures: dict[str, Any] = {
        "general": exact_match(base, "general"),
        "perplexity": round(perplexity(base, texts), 4),
        "without_adapter": {name: exact_match(base, name) for name in ("clinic", "ledger", "code")},
        "adapters": {},
    }
    for adapter, name in ADAPTERS.items():
        model = PeftModel.from_pretrained(dequantized.load(folder), DEMO / "adapters" / adapter)
        figures["adapters"][adapter] = exact_match(model, name)
    return figures


def main() -> None:
    started_s = time.monotonic()
    result: dict[str, Any] = {"bench": "quality", "machine": platform.machine(), "checkpoints": {}}
    result["versions"] = {
        name: version(name) for name in ("packhorse", "torch", "transformers", "peft")
    }
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"bf16": DEMO / "model"}
        for method in sorted(METHODS):
            folders[method] = Path(scratch) / method
            settings = Settings(
                str(DEMO / "model"), folders[method], method, quality=False, verify=False
            )
            run(settings, lambda label, steps: lambda done: None)
        for name, folder in folders.items():
            result["checkpoints"][name] = checkpoint_figures(folder)
            print(name, json.dumps(result["checkpoints"][name]), flush=True)
    result["seconds"] = round(time.monotonic() - started_s)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
