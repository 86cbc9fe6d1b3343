"""Mixture-of-experts models, Mixtral's and Qwen3's kind, tiny and random: taken apart, quantized
expert by expert, read back.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from packhorse.quantize import run as run_module
from packhorse.quantize.calibration.block_loader import Block
from packhorse.quantize.calibration.runner import Runner, RunningBlock
from packhorse.quantize.errors import BadInput, OutOfMemory, QuantizeError, Unsupported
from packhorse.quantize.model.checkpoint import REPORT, Checkpoint
from packhorse.quantize.model.experts import Experts, unfuse_experts
from packhorse.quantize.model.families import FAMILIES
from packhorse.quantize.plan.host import Host
from packhorse.quantize.plan.planner import plan
from packhorse.quantize.quality import dequantized
from packhorse.quantize.run import decide, run
from packhorse.quantize.settings import Settings
from tests.unit.quantize.test_pipeline import LITTLE, made, output_errors, text_ids  # noqa: F401

KINDS = ("mixtral", "qwen3_moe")
SPARSE = {"mixtral": ("0", "1"), "qwen3_moe": ("1",)}
TENSORS = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w2", "w3")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "down_proj", "up_proj")),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(kind, tmp_path_factory.mktemp(kind) / "model")


def quantized(model: Path, out: Path, method: str, **options: Any) -> dict[str, Any]:
    settings = Settings(str(model), out, method, **{**LITTLE, "targets": ("cuda",), **options})
    run(settings, lambda *_: lambda _: None)
    report: dict[str, Any] = json.loads((out / REPORT).read_text())
    return report


@torch.inference_mode()
def test_apart_they_compute_what_they_did_together(model: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.arange(3, 131).reshape(2, 64)
    wanted = whole(ids).logits
    unfuse_experts(whole)
    assert any(isinstance(part, Experts) for part in whole.modules())
    torch.testing.assert_close(whole(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    for part in whole.modules():
        if isinstance(part, Experts):
            part.is_recorded = True  # the sample must not reach the output
    torch.testing.assert_close(whole(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_methods_gain_expert_by_expert(
    kind: str,
    model: Path,
    tmp_path: Path,
    text_ids: torch.Tensor,  # noqa: F811
) -> None:
    reports, folders = {}, {}
    for method in ("rtn", "gptq", "awq", "int8"):
        options = {"calibration": None} if method == "rtn" else {}
        folders[method] = tmp_path / method
        reports[method] = quantized(model, folders[method], method, **options)
    errors = output_errors(model, folders, text_ids)
    assert errors["gptq"] < 0.5 * errors["rtn"]
    assert errors["awq"] < errors["rtn"]
    assert errors["int8"] < 0.05 * errors["rtn"]
    where, parts = TENSORS[kind]
    made_of = Checkpoint(folders["gptq"])
    original = Checkpoint(model)
    for block in SPARSE[kind]:
        start = f"model.layers.{block}.{where}"
        for number in range(4):
            for part in parts:
                assert f"{start}.{number}.{part}.weight_packed" in made_of
        gate = f"{start.removesuffix('.experts')}.gate"
        assert gate in made_of.config["quantization_config"]["ignore"]
        assert made_of.get(f"{gate}.weight").equal(original.get(f"{gate}.weight"))
    tokens = reports["gptq"]["experts"]
    assert set(tokens) == {f"model.layers.{block}" for block in SPARSE[kind]}
    # Every token is sent to two experts.
    assert all(sum(counts) == 2 * 4096 for counts in tokens.values())


def test_an_expert_that_is_never_chosen_is_quantized_by_the_others_tokens(
    kind: str, model: Path, tmp_path: Path
) -> None:
    lonely = tmp_path / "lonely"
    shutil.copytree(model, lonely)
    tensors = load_file(lonely / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".gate.weight"):
            # All logits 0 but for its own, which follow one input's sign: chosen or last.
            tensor.zero_()
            tensor[0] = 1e3 * torch.sign(torch.randn(tensor.shape[1])).to(tensor.dtype)
            tensor[3] = -tensor[0]
            tensor[1] = tensor[2] = 0
    save_file(tensors, lonely / "model.safetensors", {"format": "pt"})
    report = quantized(lonely, tmp_path / "out", "gptq")
    counts = next(iter(report["experts"].values()))
    assert min(counts) < sum(counts) / 4
    assert all(layer["output_error"] < 0.05 for layer in report["layers"])


def test_rare_experts_are_told_of(kind: str, model: Path, tmp_path: Path) -> None:
    report = quantized(model, tmp_path / "out", "gptq", calibration_tokens=256)
    assert any("experts were sent fewer than 256 calibration tokens" in n for n in report["notes"])


def test_kept_dense_layers_of_qwen3_moe_are_named_as_vllm_looks_them_up(tmp_path: Path) -> None:
    model = made("qwen3_moe", tmp_path / "model")
    settings = Settings(
        str(model), tmp_path / "out", "int8", keep=("model.layers.0.mlp.gate_proj",)
    )  # fmt: skip
    ignored = decide(settings)[2].ignored
    assert {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up_proj"} <= set(ignored)
    assert "model.layers.1.mlp.gate" in ignored


def test_one_kept_expert_keeps_its_block(kind: str, model: Path, tmp_path: Path) -> None:
    where, parts = TENSORS[kind]
    keep = f"model.layers.1.{where}.2.{parts[0]}"
    report = quantized(model, tmp_path / "out", "gptq", keep=(keep,))
    assert any("kept too, as vLLM fuses it" in note for note in report["notes"])
    made_of = Checkpoint(tmp_path / "out")
    for number in range(4):
        for part in parts:
            name = f"model.layers.1.{where}.{number}.{part}.weight"
            assert made_of.get(name).equal(Checkpoint(model).get(name))
    dequantized.load(tmp_path / "out")


REFUSED: dict[str, tuple[dict[str, Any], type[QuantizeError], str]] = {
    "gptq's layout": ({"format": "gptq", "targets": ("cuda",)}, Unsupported, "never tried"),
    "asymmetric on a CPU": ({"method": "awq"}, Unsupported, "takes symmetric only"),
    "groups of 32 on a CPU": ({}, Unsupported, "experts in groups of 32"),
    "no groups on a CPU": ({"group_size": -1}, Unsupported, "with a scale per output"),
    "fp8 on a CPU": ({"method": "fp8"}, Unsupported, "fp8 with experts"),
    "mixed": ({"bits": 4.9}, Unsupported, "experts cannot be mixed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_experts_do_not_load_with_is_refused(model: Path, tmp_path: Path, case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        decide(Settings(str(model), tmp_path / "out", **{"method": "gptq", **options}))


def test_a_missing_expert_is_an_incomplete_checkpoint(
    kind: str, model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    where, _ = TENSORS[kind]
    tensors = load_file(broken / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if f"1.{where}.3." not in name}
    save_file(kept, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"of 4 experts, model.layers.1 has 3; .* incomplete"):
        decide(Settings(str(broken), tmp_path / "out", "gptq", targets=("cuda",)))


@pytest.mark.parametrize("amx", [True, False])
def test_experts_load_on_cpus_with_amx_only(model: Path, amx: bool) -> None:
    host = Host(
        amx=amx, avx512=True, avx512_bf16=True, cuda_capability=None, flops_per_s=1e11
    )  # fmt: skip
    source = Checkpoint(model)
    family = FAMILIES[source.config["model_type"]]
    planned = plan(Settings(str(model), model, "int8"), source, family, host=host)
    assert (planned.not_checkable_here is None) == amx
    assert amx or "no AMX" in str(planned.not_checkable_here)
    assert any("with AMX only" in note for note in planned.notes)


def test_the_largest_block_is_tried_first_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Qwen3's two blocks the second has the experts: memory that is too small is too small in
    the first minute.
    """
    model = made("qwen3_moe", tmp_path / "model")
    entered: list[int] = []
    enter = Runner.enter
    full = False

    def watched(self: Runner, block: Block) -> RunningBlock:
        entered.append(block.index)
        if full and block.index == 1:
            raise MemoryError
        return enter(self, block)

    monkeypatch.setattr(Runner, "enter", watched)
    quantized(model, tmp_path / "tried", "gptq")
    assert entered == [1, 0, 1]
    full = True
    entered.clear()
    with pytest.raises(OutOfMemory, match="the plan was for"):
        quantized(model, tmp_path / "full", "gptq")
    assert entered == [1]
    full = False
    monkeypatch.setattr(run_module, "largest_block", lambda *_: 0)
    entered.clear()
    quantized(model, tmp_path / "untried", "gptq")
    assert entered == [0, 1]
    tried, untried = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("tried", "untried")
    )
    assert tried == untried
