"""The report's JSON: one shape, whatever was measured; stages; the divergence as part of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from packhorse.quantize.model import sizes
from packhorse.quantize.model.memory import peak_memory_bytes
from packhorse.quantize.output.convert import LayerResult
from packhorse.quantize.quality.eval_data import EvalData
from packhorse.quantize.quality.measure import measure, measure_divergence
from packhorse.quantize.report import page
from packhorse.quantize.report.report import Report, Stage
from tests.conftest import DEMO
from tests.unit.quantize.test_pipeline import made
from tests.unit.quantize.test_run import no_progress

PLAN: dict[str, Any] = {
    "method": "rtn", "scheme": "W4A16", "format": "gptq", "bits": 4, "group_size": 32,
    "symmetric": True, "kv_scales": False,
}  # fmt: skip


def test_the_keys_are_the_same_whatever_was_measured() -> None:
    empty = Report("model", PLAN, 100).as_json()
    full = Report(
        "model", PLAN, 100, 50, quality_before={"perplexity": 5.0, "predictions": 2000},
        quality_after={"perplexity": 5.0, "predictions": 2000}, seed=3,
        stages=[Stage("quantizing", 1.0, 70), Stage("measuring", 2.0, 80)],
        layers=[LayerResult("model.layers.0.a", 4, 0.1, 0.01, "damped by 0.1")],
    ).as_json()  # fmt: skip
    assert empty.keys() == full.keys()
    # Read by `quantize inspect`, tests and users: they stay.
    assert {"method", "bytes", "quality", "weights_sha256", "notes", "plan", "proof"} <= full.keys()
    assert empty["verdict"]["level"] == "not measured"
    assert empty["peak_memory_bytes"] is None
    assert full["verdict"]["level"] == "good"
    assert full["peak_memory_bytes"] == 80
    assert full["seed"] == 3
    assert full["layers"][0]["note"] == "damped by 0.1"
    assert json.loads(json.dumps(full)) == full


def test_a_stage_has_its_seconds_and_the_peak_until_its_end() -> None:
    report = Report("model", PLAN, 100)
    before = peak_memory_bytes()
    with report.stage("quantizing"):
        kept = bytearray(b"x" * 50_000_000)
    assert len(kept) == 50_000_000
    (stage,) = report.stages
    assert stage.name == "quantizing"
    assert stage.seconds >= 0
    assert stage.peak_memory_bytes >= before > 10_000_000
    with pytest.raises(ValueError, match="broken"), report.stage("measuring"):
        raise ValueError("broken")
    assert len(report.stages) == 1


def test_a_run_on_text_ends_in_a_page(tmp_path: Path) -> None:
    original = made("llama", tmp_path / "original")
    text = tmp_path / "text.jsonl"
    lines = (DEMO / "eval" / "held_out_text.jsonl").read_text(encoding="utf-8").splitlines()
    text.write_text("\n".join(lines[:40]), encoding="utf-8")
    eval_data = EvalData(text_file=text)
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    report = Report(str(original), PLAN, 100, 100, eval_data=eval_data.as_json())
    report.quality_before = measure(original, eval_data, "before", no_progress)
    report.quality_after = measure(copy, eval_data, "after", no_progress)
    report.divergence = measure_divergence(original, copy, eval_data, no_progress)
    report.weights_after = sizes.of(copy)
    found = report.as_json()
    assert found["quality"]["distance"]["kl_mean"] == 0
    assert found["quality"]["distance"]["positions"] == found["quality"]["after"]["predictions"]
    assert found["quality"]["distance"]["positions"] > 1000
    assert found["verdict"]["level"] == "good"  # no score, no load check
    assert "<svg" in page.render([found], ["copy"])
    assert measure_divergence(original, copy, EvalData(), no_progress) is None
