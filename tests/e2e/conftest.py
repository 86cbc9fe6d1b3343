"""One real vLLM server on the INT8 demo model, and one on the original, for the whole session."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import BIN, DEMO, Server, running_server


@pytest.fixture(scope="session")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`quantize model demo/model --method int8`, run as a user runs it."""
    out = tmp_path_factory.mktemp("quantized") / "demo-int8"
    command = [BIN / "quantize", "model", DEMO / "model", "--method", "int8", "--out", out]
    subprocess.run(command, check=True, timeout=300)
    return out


@pytest.fixture(scope="session")
def int8_server(int8_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("int8"), str(int8_folder)) as server:
        yield server


@pytest.fixture(scope="session")
def base_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("base"), str(DEMO / "model")) as server:
        yield server
