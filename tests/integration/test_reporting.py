"""What failed, hung and flaky tests leave behind: pytest in a process of its own, on tests that are
made to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.reporting import NOTES

TESTS = """
import signal
import time
from pathlib import Path

import httpx
import pytest

@pytest.mark.timeout(3)
def test_hangs(echo_server):
    asked = {"model": "echo", "messages": [{"role": "user", "content": "what it asked"}]}
    httpx.post(echo_server.url + "/v1/chat/completions", json=asked)
    time.sleep(100)

def test_goes_on(echo_server):
    assert httpx.get(echo_server.url + "/health/ready").status_code == 200

@pytest.mark.timeout(100)
def test_fails_once(echo_server):
    urls = Path("urls")
    seen = urls.read_text() if urls.exists() else ""
    urls.write_text(echo_server.url)
    assert seen and seen != echo_server.url

def test_skips():
    pytest.skip("NOT TESTED HERE: there is no such-program")
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("made")
    (folder / "conftest.py").write_text("from tests.conftest import *\n")
    (folder / "test_made.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--reruns", "1"]
    command += ["-p", "no:cacheprovider", "-o", f"pythonpath={ROOT}", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != NOTES}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    return done.stdout


def test_a_hung_test_fails_alone_with_its_stacks_and_the_servers(said: str) -> None:
    assert "1 failed, 2 passed, 1 skipped, 2 rerun" in said
    assert "Timeout (>3.0s)" in said
    stacks = said.partition("log of http://")[2]
    assert "most recent call first" in stacks, "the server has not written its own"
    assert "runner.run(serve(settings))" in stacks or "in run" in stacks


def test_a_failure_shows_the_servers_log_its_metrics_and_the_request(said: str) -> None:
    assert "log of http://127.0.0.1" in said
    assert "Serving echo at" in said
    assert "metrics of http://127.0.0.1" in said
    assert "last request" in said
    assert "what it asked" in said


def test_a_test_that_passes_with_a_fresh_server_is_told_as_flaky(said: str) -> None:
    assert "FLAKY: " in said
    assert "test_fails_once" in said.partition("FLAKY: ")[2].splitlines()[0]


def test_what_is_skipped_is_told_once_with_the_command_that_brings_it(said: str) -> None:
    (line,) = [line for line in said.splitlines() if line.startswith("NOT TESTED HERE")]
    assert "such-program (1)" in line
    assert "make services" in line
