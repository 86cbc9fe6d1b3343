"""The INT8 demo model, and one real vLLM server on it for the whole session.

One engine at a time: an engine that waits for work spins, and on two cores it would starve whatever
else the tests compute.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import BIN, DEMO, Server, running_server
from tests.e2e.questions import QUESTIONS, Score, ask_all


@pytest.fixture(scope="session")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`quantize model demo/model --method int8`, run as a user runs it."""
    out = tmp_path_factory.mktemp("quantized") / "demo-int8"
    command = [BIN / "quantize", "model", DEMO / "model", "--method", "int8", "--out", out]
    subprocess.run(command, check=True, timeout=600)
    return out


@pytest.fixture(scope="session")
def base_score(int8_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Score:
    """The original's score through a server that runs only for this."""
    with running_server(tmp_path_factory.mktemp("base"), str(DEMO / "model")) as server:
        return ask_all(server, QUESTIONS)


@pytest.fixture(scope="session")
def int8_server(
    int8_folder: Path, base_score: Score, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The server of most tests; starts when the original's is gone."""
    with running_server(tmp_path_factory.mktemp("int8"), str(int8_folder)) as server:
        yield server
