"""Every kind of checkpoint that we write, and what other tools write, loads in vLLM on a CPU, and
computes what its codes say: its log-probabilities are those of the dequantized model in
transformers. Which kinds are refused before any work is in tests/unit/quantize/test_planner.py.

Other tools take minutes to install, so their checkpoints are rebuilt here: peers/*.json hold the
config.json and the tensors' names, dtypes and shapes as a tool wrote them for the demo model; the
codes are ours. The real ones were loaded by hand (docs/lab-log.md).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from packhorse.quantize.calibration.dataset import read_texts
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.quality import dequantized
from packhorse.quantize.quality.evaluate import apart
from packhorse.quantize.run import run
from packhorse.quantize.settings import CHANNEL, Settings
from tests.conftest import DEMO, ROOT, start
from tests.e2e import roundings
from tests.e2e.conftest import AVX512, needs_avx512

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
    "GPTQ by gptq, groups of 32": {"method": "gptq", "format": "gptq", "group_size": 32},
    "GPTQ, a scale an output": {"format": "gptq", "group_size": CHANNEL},
    "AWQ by awq, groups of 128": {"method": "awq", "format": "awq"},
    "AWQ by gptq, groups of 32": {
        "method": "gptq", "format": "awq", "symmetric": False, "group_size": 32
    },
    "KV scales": {"kv": "fp8"},
    "INT8, some layers kept": {"method": "int8", "keep": ("*.0.mlp.*", "*.3.self_attn.o_proj")},
    "mixed": {"method": "gptq", "bits": 5.5},
}  # fmt: skip
# A peer's file -> the row whose codes it gets.
PEERS = {
    "llm_compressor_gptq": "4 bits, groups of 128",
    "llm_compressor_w8a8": "INT8",
    "auto_round_gptq": "GPTQ, groups of 128",
}
DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
KINDS = ("INT8", "KV scales")
EIGHT_BITS = dict.fromkeys(("FP8", "mixed", "llm_compressor_w8a8"), "INT8")  # activations, too
# Cannot run on a CPU without AVX-512, and is missing there; the row says so.
WIDE = ("KV scales",)
QUICK = {"quality": False, "verify": False, "calibration_tokens": 1024, "force": True}


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
    for peer, row in PEERS.items():
        made[peer] = as_written_by(peer, made[row], place / peer)
    return made


def as_written_by(peer: str, codes: Path, folder: Path) -> Path:
    """The checkpoint `codes` in the other tool's words: its config.json, exactly its tensors."""
    written = json.loads((Path(__file__).parent / "peers" / f"{peer}.json").read_text())
    blocks = range(written["config"]["num_hidden_layers"])
    ours = Checkpoint(codes)
    tensors = {
        name.replace(".0.", f".{index}.", 1): (DTYPES[dtype], shape)
        for name, (dtype, *shape) in written["tensors"].items()
        for index in (blocks if ".layers." in name else (0,))
    }
    assert set(tensors) == set(ours.names())
    for name, (_, shape) in tensors.items():
        assert list(ours.get(name).shape) == shape, name
    folder.mkdir()
    converted = {name: ours.get(name).to(dtype) for name, (dtype, _) in tensors.items()}
    save_file(converted, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(written["config"]))
    return folder


@pytest.fixture(scope="module")
def served(
    folders: dict[str, Path], prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What vLLM gives the prompts, by folder; with 16-bit activations under 4-bit weights."""
    place = tmp_path_factory.mktemp("served")
    asked, answered = place / "prompts.json", place / "answers.json"
    asked.write_text(json.dumps(prompts))
    loadable = [folder for row, folder in folders.items() if AVX512 or row not in WIDE]
    command = [sys.executable, "-m", "tests.e2e.loads_child", asked, answered, *loadable]
    environment = {
        **os.environ, "VLLM_CPU_INT4_W4A8": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    with (place / "log").open("wb") as log:
        child = start(list(map(str, command)), ROOT, log.fileno(), environment, fresh=False)
        try:
            code = child.wait(900)
        finally:
            child.kill()
    assert code == 0, (place / "log").read_text(errors="replace")[-4000:]
    answers: dict[str, Any] = json.loads(answered.read_text())
    return answers


@pytest.fixture(scope="module")
def limits(folders: dict[str, Path], prompts: list[list[int]]) -> dict[str, float]:
    """What roundings allow, by what is rounded: nothing but sums, activations, or the cache."""
    return {
        "4 bits": roundings.allowed(folders["4 bits, groups of 128"], prompts),
        "INT8": roundings.allowed(folders["INT8"], prompts),
        "KV scales": roundings.allowed(folders["KV scales"], prompts, eight_bit_cache=AVX512),
    }


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=needs_avx512 if row in WIDE else ()) for row in [*ROWS, *PEERS]],
)
def test_vllm_computes_what_the_codes_say(
    row: str,
    folders: dict[str, Path],
    served: dict[str, Any],
    prompts: list[list[int]],
    limits: dict[str, float],
) -> None:
    found = served[str(folders[row])]
    assert isinstance(found, dict), found
    wanted = dequantized.logprobs(folders[row], prompts)
    differences = [
        difference
        for one, other in zip(found["logprobs"], wanted, strict=True)
        for difference in apart(one, other)
    ]
    assert len(differences) > 250
    kind = next((kind for kind in KINDS if kind in row), EIGHT_BITS.get(row, "4 bits"))
    assert sum(differences) / len(differences) < limits[kind]


@needs_avx512
def test_vllm_chooses_an_8_bit_cache_where_there_are_scales_for_it_and_nowhere_else(
    folders: dict[str, Path], served: dict[str, Any]
) -> None:
    caches = {row: served[str(folder)]["kv_cache_dtypes"] for row, folder in folders.items()}
    assert caches.pop("KV scales") == ["fp8"]
    assert all(cache == ["auto"] for cache in caches.values()), caches


def test_the_row_of_negative_scales_has_some(folders: dict[str, Path]) -> None:
    made = Checkpoint(folders["negative scales"])
    scales = [made.get(name) for name in made.names() if name.endswith("weight_scale")]
    assert any((scale < 0).any() for scale in scales)
