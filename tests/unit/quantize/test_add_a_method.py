"""The walk in docs/add-a-method.md works: its method is planned, quantizes, and passes its test."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.quantize.methods import METHODS
from packhorse.quantize.model.checkpoint import REPORT
from packhorse.quantize.numerics.grid import (
    QuantizationArgs,
    Scheme,
    relative_error,
    round_to_nearest,
)
from packhorse.quantize.plan.planner import RULES, Rule
from packhorse.quantize.run import run
from packhorse.quantize.settings import Settings
from tests.conftest import ROOT

PAGE = (ROOT / "docs/add-a-method.md").read_text(encoding="utf-8")


def test_the_method_of_the_page_works(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in (METHODS, RULES):
        monkeypatch.setitem(table, "mse", None)  # removed again after the test
    names: dict[str, Any] = {
        "METHODS": METHODS, "RULES": RULES, "Rule": Rule, "QuantizationArgs": QuantizationArgs,
        "relative_error": relative_error, "round_to_nearest": round_to_nearest, "Scheme": Scheme,
        "torch": torch,
    }  # fmt: skip
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "mse.py").write_text(blocks[0])
    monkeypatch.syspath_prepend(tmp_path)
    names["Mse"] = importlib.import_module("mse").Mse
    for block in blocks[1:]:
        exec(compile(block, "docs/add-a-method.md", "exec"), names)
    tests = [names[name] for name in names if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()
    settings = Settings(str(tiny_checkpoint), tmp_path / "out", "mse", quality=False, verify=False)
    run(settings, lambda label, steps: lambda done: None)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["method"] == "mse"
    assert len(report["layers"]) == 3 * 7


def test_every_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`((?:quantize|tests)/[\w/.]+)`", PAGE)) - {"quantize/methods/mse.py"}
    assert len(named) >= 8
    assert not [name for name in named if not (ROOT / name).exists()]
