"""Every kind of checkpoint that we write loads in vLLM on a CPU, and computes what its codes say:
its log-probabilities are those of the dequantized model in transformers. Which kinds are refused
before any work is in tests/unit/quantize/test_planner.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize import simulate
from quantize.checkpoint import Checkpoint
from quantize.evaluate import read_texts
from quantize.run import run
from quantize.settings import CHANNEL, Settings
from tests.conftest import DEMO, ROOT

ROWS: dict[str, dict[str, Any]] = {
    "4 bits, groups of 128": {},
    "4 bits, groups of 64": {"group_size": 64},
    "4 bits, groups of 32": {"group_size": 32},
    "4 bits, a scale an output": {"group_size": CHANNEL},
    "4 bits, asymmetric, groups of 128": {"symmetric": False},
    "4 bits, asymmetric, groups of 32": {"symmetric": False, "group_size": 32},
    "4 bits, asymmetric, a scale an output": {"symmetric": False, "group_size": CHANNEL},
    "negative scales": {"method": "gptq"},
    "INT8": {"method": "int8"},
    "FP8": {"method": "fp8"},
    "GPTQ, groups of 128": {"format": "gptq"},
    "GPTQ, groups of 32": {"format": "gptq", "group_size": 32},
    "GPTQ, a scale an output": {"format": "gptq", "group_size": CHANNEL},
    "AWQ, groups of 128": {"format": "awq", "symmetric": False},
    "AWQ, groups of 32": {"format": "awq", "symmetric": False, "group_size": 32},
}
QUICK = {"quality": False, "verify": False, "calibration_tokens": 4096, "force": True}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    texts = read_texts(DEMO / "eval/held_out_text.jsonl", tokenizer)
    return [ids[:40] for ids in texts if len(ids) > 40][:8]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("loads")
    made = {}
    for number, (row, options) in enumerate(ROWS.items()):
        made[row] = place / f"row-{number}"
        settings: dict[str, Any] = {"method": "rtn", **QUICK, **options}
        run(Settings(str(DEMO / "model"), made[row], **settings), lambda *_: lambda _: None)
    return made


@pytest.fixture(scope="module")
def served(
    folders: dict[str, Path], prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What vLLM gives the prompts, by folder; with 16-bit activations under 4-bit weights."""
    place = tmp_path_factory.mktemp("served")
    asked, answered = place / "prompts.json", place / "answers.json"
    asked.write_text(json.dumps(prompts))
    command = [sys.executable, "-m", "tests.e2e.loads_child", asked, answered, *folders.values()]
    environment = {
        **os.environ, "VLLM_CPU_INT4_W4A8": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=900)
    answers: dict[str, Any] = json.loads(answered.read_text())
    return answers


@torch.inference_mode()
def reference(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    model = simulate.load(folder)
    found = []
    for ids in prompts:
        logits = model(torch.tensor([ids])).logits[0].float()
        steps = logits[:-1].log_softmax(dim=-1)
        found.append(steps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return found


@pytest.mark.parametrize("row", ROWS)
def test_vllm_computes_what_the_codes_say(
    row: str, folders: dict[str, Path], served: dict[str, Any], prompts: list[list[int]]
) -> None:
    found = served[str(folders[row])]
    assert isinstance(found, list), found
    wanted = torch.cat(reference(folders[row], prompts))
    differences = (torch.tensor([value for row in found for value in row]) - wanted).abs()
    assert len(differences) > 250
    assert differences.mean() < 0.02


def test_the_row_of_negative_scales_has_some(folders: dict[str, Path]) -> None:
    made = Checkpoint(folders["negative scales"])
    scales = [made.get(name) for name in made.names() if name.endswith("weight_scale")]
    assert any((scale < 0).any() for scale in scales)
