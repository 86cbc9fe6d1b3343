"""Mixed precision: what is measured, how a budget is spent, and what a run makes of it; and layers
that are kept.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.quantize import formats
from packhorse.quantize.calibration.block_loader import load_blocks
from packhorse.quantize.calibration.runner import Runner
from packhorse.quantize.errors import BadInput, QuantizeError, Unsupported
from packhorse.quantize.methods.bit_allocation import Choice, spend
from packhorse.quantize.model.checkpoint import REPORT, Checkpoint, sha256_of
from packhorse.quantize.model.families import FAMILIES
from packhorse.quantize.numerics.grid import QuantizationArgs, Scheme, round_to_nearest
from packhorse.quantize.output.workspace import Workspace
from packhorse.quantize.quality import dequantized
from packhorse.quantize.quality.sensitivity import mean_divergence, split_rows
from packhorse.quantize.run import decide, run
from packhorse.quantize.settings import Settings
from tests.unit.quantize.test_pipeline import LITTLE, made

W4, FINE, W8 = (
    Scheme(QuantizationArgs(4, 128)),
    Scheme(QuantizationArgs(4, 32)),
    Scheme(QuantizationArgs(8), 8),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("llama", tmp_path_factory.mktemp("mixed") / "model", intermediate_size=128)


def quantized(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings = {"method": "gptq", **LITTLE, **options}
    run(Settings(str(model), out, **settings), lambda *_: lambda _: None)
    report: dict[str, Any] = json.loads((out / REPORT).read_text())
    return report


def test_a_budget_goes_where_it_saves_most_per_byte() -> None:
    choices = {
        ("dear",): [Choice(W4, 100, 10.0), Choice(FINE, 110, 7.0), Choice(W8, 200, 0.1)],
        ("cheap",): [Choice(W4, 100, 0.5), Choice(FINE, 110, 0.3), Choice(W8, 200, 0.0)],
        ("large",): [Choice(W4, 1000, 11.0), Choice(W8, 2000, 0.0)],
    }

    def spent(budget: int) -> list[Scheme | None]:
        return [choice.scheme for choice in spend(choices, budget).values()]

    assert spent(1200) == [W4, W4, W4]
    assert spent(1211) == [FINE, W4, W4]
    assert spent(1311) == [W8, FINE, W4]
    assert spent(1400) == [W8, W8, W4]
    assert spent(2400) == [W8, W8, W8]


def test_divergence_is_that_of_the_formula() -> None:
    wanted, found = torch.randn(2, 300, 7), torch.randn(2, 300, 7)
    p, q = wanted.softmax(-1), found.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert math.isclose(mean_divergence(wanted, found), expected, rel_tol=1e-4)
    assert mean_divergence(wanted, wanted) == 0


@torch.inference_mode()
def test_the_head_gives_the_models_logits(model: Path, tmp_path: Path) -> None:
    for name in ("llama", "gemma2", "qwen3"):
        folder = model if name == "llama" else made(name, tmp_path / name)
        rows = torch.randint(3, 2048, (2, 64))
        source, family = Checkpoint(folder), FAMILIES[name]
        runner = Runner(source, family, rows, torch.device("cpu"))
        for block in load_blocks(source, family):
            runner.leave(runner.enter(block))
        found = runner.head()(runner.hidden("quantized", 0))
        wanted = dequantized.load(folder).float()(rows).logits
        assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_a_group_that_matters_gets_more_bits(model: Path, tmp_path: Path) -> None:
    """One group of layers alone speaks up: its errors are the model's."""
    loud = tmp_path / "loud"
    source = dequantized.load(model)
    source.get_parameter("model.layers.1.mlp.down_proj.weight").data.mul_(30)
    source.save_pretrained(loud)
    for path in model.iterdir():
        if path.suffix not in (".safetensors",) and path.name != "config.json":
            (loud / path.name).write_bytes(path.read_bytes())
    report = quantized(loud, tmp_path / "out", bits=5.0001, seed=3)
    got = {group["layers"][-1]: group for group in report["plan"]["precision"]}
    costs = {name: group["cost_kl"] for name, group in got.items()}
    assert max(costs, key=lambda name: costs[name]) == "model.layers.1.mlp.down_proj"
    assert got["model.layers.1.mlp.down_proj"]["got"] in ("W8A8", "unchanged")


def test_mixed_checkpoints_stay_in_their_budget_and_read_back(model: Path, tmp_path: Path) -> None:
    sizes = {}
    for bits in (4.6, 6.5):
        out = tmp_path / str(bits)
        report = quantized(model, out, bits=bits)
        found = Checkpoint(out)
        linears = [name for group in report["plan"]["precision"] for name in group["layers"]]
        of_linears = sum(
            found.get(name).nbytes
            for name in found.names()
            if any(name.startswith(f"{prefix}.") for prefix in linears)
        )
        original = Checkpoint(model)
        weights = sum(original.get(f"{prefix}.weight").numel() for prefix in linears)
        sizes[bits] = 8 * of_linears / weights
        assert bits - 0.6 < sizes[bits] <= bits + 0.01
        assert len(set(report["plan"]["others"].values())) >= 1
        ids = torch.arange(1, 65)[None]
        wanted, got = (dequantized.load(folder)(ids).logits.float() for folder in (model, out))
        assert torch.corrcoef(torch.stack([wanted.flatten(), got.flatten()]))[0, 1] > 0.97
    assert sizes[4.6] < sizes[6.5]


def test_costs_are_measured_once_however_often_a_run_is_cut_short(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    quantized(model, whole, bits=4.6)
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "finish_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantized(model, out, bits=4.6)
    monkeypatch.setattr("packhorse.quantize.run.measure_costs", lambda *_: 1 / 0)
    with pytest.raises(BadInput, match=r"budget: 4\.6 then, 4\.7 now"):
        quantized(model, out, bits=4.7, resume=True)
    quantized(model, out, bits=4.6, resume=True)
    made_of = [sha256_of(Checkpoint(folder).weight_files()) for folder in (whole, out)]
    assert made_of[0] == made_of[1]


@pytest.mark.parametrize("method", ["gptq", "awq", "int8", "rtn"])
def test_kept_layers_stay_and_their_fused_ones_with_them(
    model: Path, tmp_path: Path, method: str
) -> None:
    report = quantized(
        model,
        tmp_path / "out",
        method=method,
        keep=("model.layers.0.*", "re:.*\\.1\\.self_attn\\.k_proj"),
        **({"calibration": None} if method == "rtn" else {}),
    )
    found, original = Checkpoint(tmp_path / "out"), Checkpoint(model)
    assert any("kept too, as vLLM fuses it" in note for note in report["notes"])
    ignored = found.config["quantization_config"]["ignore"]
    for name in ("0.mlp.down_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"):
        prefix = f"model.layers.{name}"
        assert prefix in ignored
        kept = found.get(f"{prefix}.weight")
        assert kept.dtype == torch.bfloat16
        assert kept.equal(original.get(f"{prefix}.weight"))
    assert len(report["layers"]) == 4
    dequantized.load(tmp_path / "out")


REFUSED: dict[str, tuple[dict[str, Any], type[QuantizeError], str]] = {
    "too little": ({"bits": 4.05}, BadInput, r"--bits 4\.05: .* take 4\.268 bits already"),
    "too much": ({"bits": 17.5}, BadInput, "more than 4 and less than 16"),
    "int8": ({"method": "int8", "bits": 6.5}, Unsupported, "needs --method gptq or awq"),
    "gptq's layout": ({"format": "gptq", "bits": 4.5}, Unsupported, "mixes kinds of layers"),
    "no number": ({"bits": math.nan}, BadInput, "more than 4 and less than 16"),
    "endless": ({"bits": math.inf}, BadInput, "more than 4 and less than 16"),
    "nothing is called so": ({"keep": ("lm_hat",)}, BadInput, "no layer is called like that"),
    "no pattern": ({"keep": ("re:(",)}, BadInput, "no regular expression"),
    "all": ({"keep": ("*",)}, BadInput, "nothing is left to quantize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_mixed_or_kept_is_refused(model: Path, tmp_path: Path, case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        decide(Settings(str(model), tmp_path / "out", **{"method": "gptq", **options}))


def test_8_bits_of_weights_alone_are_a_choice_for_gpus_only(model: Path, tmp_path: Path) -> None:
    chosen = {}
    for targets in (("cpu", "cuda"), ("cuda",)):
        settings = Settings(str(model), tmp_path / "out", "gptq", bits=4.5, targets=targets)
        planned = decide(settings)[2]
        chosen[targets] = {str(scheme) for scheme in planned.choices}
        assert planned.budget == 4.5
        assert planned.scheme == Scheme(QuantizationArgs(4, 64))
    assert chosen == {("cpu", "cuda"): {"W4A16", "W8A8"}, ("cuda",): {"W4A16", "W8A8", "W8A16"}}


def test_rows_that_judge_are_not_those_that_are_looked_at() -> None:
    rows = torch.arange(160)[:, None].expand(160, 512)
    judged, seen = split_rows(rows)
    assert len(judged) == 8
    assert len(seen) == 32
    assert not set(judged[:, 0].tolist()) & set(seen[:, 0].tolist())
    one = rows[:1]
    assert all(part.equal(one) for part in split_rows(one))


MIXED = {
    "model.layers.0.mlp.gate_proj": Scheme(QuantizationArgs(8), 8),
    "model.layers.0.mlp.up_proj": Scheme(QuantizationArgs(8), 8),
    "model.layers.1.self_attn.o_proj": Scheme(QuantizationArgs(4, 32)),
    "model.layers.1.mlp.down_proj": Scheme(QuantizationArgs(8, 128)),
}


def test_layers_of_several_kinds_come_back_as_they_were() -> None:
    written = formats.make("compressed-tensors", Scheme(QuantizationArgs(4, 128)), MIXED)
    config = written.config(ignore=["lm_head"], kv_scales=False)
    config = json.loads(json.dumps(config))
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == [
        "pack-quantized", "int-quantized", "pack-quantized", "pack-quantized"
    ]  # fmt: skip
    read = formats.of(config)
    names = ["model.layers.0.self_attn.q_proj", *MIXED]
    torch.manual_seed(0)
    stored: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(4)}
    codes = {}
    for name in names:
        args = written.scheme_of(name).weights
        codes[name] = round_to_nearest(torch.randn(64, 256), args, scale_dtype=torch.float32)
        stored |= written.tensors(name, codes[name])
    assert sorted(read.linears(list(stored))) == sorted(names)
    for name in names:
        assert read.scheme_of(name) == written.scheme_of(name)
        found = read.read(name, stored.__getitem__).dequantize()
        torch.testing.assert_close(found, codes[name].dequantize())


def test_another_layout_cannot_hold_several_kinds() -> None:
    with pytest.raises(Unsupported, match="gptq cannot hold layers of several schemes"):
        formats.make("gptq", Scheme(QuantizationArgs(4, 128)), MIXED)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (("re:.*self_attn.*", "re:.*(gate|up)_proj"), 2),
        (("model.layers.0.*",), 7),
        (("re:.*down_proj",), 12),
    ],
)
def test_what_is_not_kept_is_planned(model: Path, keep: tuple[str, ...], left: int) -> None:
    planned = decide(Settings(str(model), model.parent / "out", "gptq", keep=keep))[2]
    assert len(planned.linears) == left
    assert planned.peak_memory_bytes > 0
