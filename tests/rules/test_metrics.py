"""What is declared of metrics: documented, bounded, named as Prometheus asks."""

from __future__ import annotations

import ast
import subprocess
import sys

from packhorse.serve import metrics
from packhorse.serve.telemetry.machine import Gpus, Machine
from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase

from tests.conftest import ROOT

# Every label there is, and why its values are a closed set.
LABELS = {
    "adapter": "configuration",
    "direction": "prompt, completion",
    "field": "what known clients send, and other",
    "gpu": "numbers",
    "kind": "total, available or used",
    "mode": "busy, idle",
    "outcome": "kinds of error, kinds of look-up",
    "process": "server, engine",
    "reason": "words of the declaration",
    "stage": "stages of routing",
    "tier": "memory, store",
    "version": "of the package",
    "vllm": "of the package",
}


def test_the_page_is_what_is_declared() -> None:
    tool = [sys.executable, ROOT / "tools/make_metrics_docs.py", "--check"]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_say_what_they_are_and_their_unit() -> None:
    found = 0
    for collector in vars(metrics).values():
        if not isinstance(collector, MetricWrapperBase | Machine | Gpus):
            continue
        for family in collector.describe():
            found += 1
            assert family.name.startswith("packhorse_")
            assert family.documentation.endswith((".", "rebuild that failed).")), family.name
            if family.type == "histogram":
                assert family.name.endswith(("_seconds", "_adapters"))
            names = getattr(collector, "_labelnames", getattr(family, "_labelnames", ()))
            assert set(names) <= set(LABELS), family.name
    assert found > 50


def test_what_the_code_emits_is_there_from_the_start() -> None:
    """Literal values of labels that are a closed set; the others are kinds of error."""
    closed = {name: set(metrics.CLOSED[found]) for name, found in vars(metrics).items()
              if isinstance(found, Counter) and found in metrics.CLOSED}  # fmt: skip
    seen = 0
    for path in (ROOT / "serve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Attribute(attr=name), attr="labels"),
                    args=[ast.Constant(value=value)],
                ) if name in closed:
                    assert value in closed[name], f"{path}: {name} has no {value!r}"
                    seen += 1
    assert seen >= 6
