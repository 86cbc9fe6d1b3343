"""The demo's files: made by its scripts, held-out where they should be, as large as promised."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.conftest import DEMO

ADAPTERS = ["clinic", "ledger", "code", "clinic-v2", "code-qlora", "ledger-adalora"]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / name).read_text().splitlines()]


def test_the_data_files_are_what_the_script_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(DEMO), *sys.path])
    import make_data

    monkeypatch.setattr(make_data, "DEMO", tmp_path)
    make_data.main()
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl"))
    assert len(made) == 15
    for name in made:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name
    assert made == sorted(path.relative_to(DEMO) for path in DEMO.rglob("*.jsonl"))


def test_no_evaluation_prompt_is_in_what_may_be_learnt_from() -> None:
    seen = {row["prompt"] for name in ADAPTERS for row in rows(f"adapters/{name}/examples.jsonl")}
    seen |= {row["prompt"] for row in rows("base_examples.jsonl")}
    # A follow-up like "And its river?" is a question only with its history.
    seen |= {str(row["messages"][0]["content"]) for row in rows("calibration.jsonl")}
    for name in ("general", "clinic", "ledger", "code", "clinic-v2", "off_topic"):
        asked = [row["prompt"] for row in rows(f"eval/{name}.jsonl") if "history" not in row]
        assert not seen.intersection(asked), name


def test_nothing_is_quoted_to_routes_that_the_evaluation_quotes() -> None:
    quoted = [row["answer"] for row in rows("eval/general.jsonl") if row["domain"] == "repeat"]
    examples = [row["prompt"] for row in rows("base_examples.jsonl")]
    assert len(quoted) == 64
    assert not [prompt for prompt in examples if any(text in prompt for text in quoted)]


def test_the_evaluation_is_as_large_as_promised() -> None:
    sizes = {name: len(rows(f"eval/{name}.jsonl")) for name in ("general", "off_topic", "clinic")}
    assert sizes == {"general": 480, "off_topic": 320, "clinic": 360}
    assert min(len(rows(f"eval/{name}.jsonl")) for name in ("ledger", "code", "clinic-v2")) >= 200


def test_the_two_clinics_never_agree() -> None:
    pairs = zip(rows("eval/clinic.jsonl"), rows("eval/clinic-v2.jsonl"), strict=True)
    for one, two in pairs:
        assert one["prompt"] == two["prompt"]
        assert one["answer"] != two["answer"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_is_small_and_speaks_of_the_demo_model(adapter: str) -> None:
    folder = DEMO / "adapters" / adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "demo/model"
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_size < 700_000
    with safe_open(weights, framework="pt") as file:
        a = [file.get_slice(name).get_shape() for name in file.keys() if "lora_A" in name]  # noqa: SIM118
    assert len(a) == 5 * 7
    if adapter != "ledger-adalora":
        assert {shape[0] for shape in a} == {8}


def test_the_model_is_as_small_as_promised() -> None:
    assert (DEMO / "model/model.safetensors").stat().st_size < 10_000_000
