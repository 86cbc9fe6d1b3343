"""The load proof with the real engine: what it finds out, how it fails, what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from packhorse.quantize.errors import Unloadable
from packhorse.quantize.quality.engine_check import verify
from tests.conftest import DEMO
from tests.e2e import roundings
from tests.e2e.conftest import AVX512

MODEL = DEMO / "model"
# Of keys and values, by block: each different, none so small that the model's values overflow.
SCALES = [(0.25 + index / 100, 0.5 + index / 100) for index in range(5)]


def with_kv_scales(source: Path, folder: Path) -> Path:
    """The source with scales for an 8-bit KV cache, each one different."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for index, scales in enumerate(SCALES):
        for part, scale in zip("kv", scales, strict=True):
            tensors[f"model.layers.{index}.self_attn.{part}_scale"] = torch.tensor([scale])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_int8_checkpoint_loads_and_answers_as_the_original(
    int8_folder: Path, tmp_path: Path
) -> None:
    """With scales for an 8-bit KV cache, where the CPU has one."""
    made = with_kv_scales(int8_folder, tmp_path / "made") if AVX512 else int8_folder
    lines = (DEMO / "eval" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    asked = 20 if AVX512 else 4  # the original's bfloat16 is slow there
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for line in lines[:asked]
    ]
    steps: list[int] = []
    found = verify(MODEL, made, prompts, lambda label, total: steps.append)
    assert steps == [1, 1]
    assert found["kernel"].startswith("W8A8 int8 by ")
    assert found["dtype"] == "bfloat16"
    # q, k, v are one layer there, gate and up too.
    assert found["layers"][found["kernel"]] == 5 * 4
    scales = {
        f"model.layers.{index}.self_attn": pytest.approx({"k": k, "v": v})
        for index, (k, v) in enumerate(SCALES)
    }
    assert found["kv_cache_dtype"].startswith("fp8") == AVX512
    assert found["kv_scales"] == (scales if AVX512 else {})
    # Held to the codes, of which the 8-bit cache is no part.
    assert found["reference"]["prompt_tokens"] > 50
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts[:16]]
    limit = roundings.allowed(made, ids, eight_bit_cache=AVX512)
    assert 0 < found["reference"]["logprob_difference_mean"] < limit
    compared = found["compared"]
    assert compared["prompts"] == min(asked, 16)
    assert compared["prompt_tokens"] > 50
    # Rounding to 8 bits moves log-probabilities by some hundredths; a wrong scale by whole units.
    assert 0 < compared["logprob_difference_mean"] < 0.1
    distance = found["distance"]
    assert distance["positions"] == compared["prompt_tokens"]
    assert 0 < distance["kl_at_least_mean"] < 0.1
    assert distance["seen_probability"] > 0.9
    assert compared["answers_until_difference"] > 0.5


def test_a_checkpoint_that_does_not_load_is_an_error_with_the_cause(
    int8_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(int8_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-32].contiguous()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Unloadable, match=r"not published.*last words: \w+Error: ") as caught:
        verify(MODEL, broken)
    assert "640" in str(caught.value) or "608" in str(caught.value)


def test_an_engine_that_takes_too_long_is_ended(int8_folder: Path) -> None:
    before = set(psutil.Process().children(recursive=True))  # servers of other tests
    with pytest.raises(Unloadable, match="took longer than 2 s"):
        verify(MODEL, int8_folder, timeout_s=2)
    assert set(psutil.Process().children(recursive=True)) <= before


RUN = """
import sys
from pathlib import Path
from packhorse.quantize.quality.engine_check import verify

verify(Path(sys.argv[1]), Path(sys.argv[2]))
"""


# SIGTERM ends the caller as SIGKILL does: at once, without a word to its child.
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_caller(int8_folder: Path, ending: signal.Signals) -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", RUN, str(MODEL), str(int8_folder)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    deadline_s = time.monotonic() + 120
    descendants: list[psutil.Process] = []
    # The child is at work: it has vLLM in memory.
    while sum(process.memory_info().rss for process in descendants) < 400 * 1024**2:
        assert caller.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
        descendants = psutil.Process(caller.pid).children(recursive=True)
    caller.send_signal(ending)
    caller.wait(60)
    _, alive = psutil.wait_procs(descendants, timeout=20)
    assert not alive
