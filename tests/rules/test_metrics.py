"""What is declared of metrics: documented, bounded, named as Prometheus asks."""

from __future__ import annotations

import ast
import subprocess
import sys

from prometheus_client import Counter

from packhorse.serve.metrics import RENAMED, ModelMetrics, ServerMetrics
from tests.conftest import ROOT
from tools.make_metrics_docs import declared

# Every label there is, and why its values are a closed set.
LABELS = {
    "adapter": "configuration",
    "direction": "prompt, completion",
    "field": "what known clients send, and other",
    "gpu": "numbers",
    "kind": "total, available or used",
    "mode": "busy, idle",
    "model": "served names",
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
    found = list(declared())
    for name, kind, labels, text, _ in found:
        assert name.startswith("packhorse_")
        assert text.endswith((".", "rebuild that failed).")), name
        if kind == "histogram":
            assert name.endswith(("_seconds", "_per_step"))
        assert set(labels) <= set(LABELS), name
    assert len(found) > 50
    assert len({name for name, *_ in found}) == len(found)


def test_what_the_code_emits_is_there_from_the_start() -> None:
    """Literal values of labels that are a closed set; the others are kinds of error."""
    owners = (ServerMetrics(), ModelMetrics())
    closed = {
        name: owner.closed[found]
        for owner in owners
        for name, found in vars(owner).items()
        if isinstance(found, Counter) and found in owner.closed
    }
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


def test_renamed_ones_have_new_names_that_are_declared() -> None:
    names = {name for name, *_ in declared()}
    assert set(RENAMED) <= names
    assert not set(RENAMED.values()) & names
