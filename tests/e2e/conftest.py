"""The INT8 demo model, and one real vLLM server on it for all tests of this folder."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import BIN, DEMO, Server, running_server
from tests.e2e.questions import QUESTIONS, Score, ask_all


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of int8_server last: it stays up from the first of them on, and other modules start
    engines of their own. One at a time, see docs/lab-log.md.
    """
    items.sort(key=lambda item: "int8_server" in getattr(item, "fixturenames", ()))


def quantize(method: str, folder: Path, *options: str) -> Path:
    """`quantize model demo/model`, run as a user runs it."""
    out = folder / f"demo-{method}"
    command = [
        BIN / "quantize",
        "model",
        DEMO / "model",
        "--method",
        method,
        "--out",
        out,
        "--no-verify",
    ]
    subprocess.run([*command, *options], check=True, timeout=600)
    return out


@pytest.fixture(scope="package")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize("int8", tmp_path_factory.mktemp("int8"))


@pytest.fixture(scope="package")
def rtn_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize("rtn", tmp_path_factory.mktemp("rtn"), "--no-quality")


@pytest.fixture(scope="package")
def base_score(int8_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Score:
    """The original's score through a server that runs only for this."""
    with running_server(tmp_path_factory.mktemp("base"), str(DEMO / "model")) as server:
        return ask_all(server, QUESTIONS)


@pytest.fixture(scope="package")
def int8_server(
    int8_folder: Path, base_score: Score, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The server of most tests; starts when the original's is gone."""
    with running_server(tmp_path_factory.mktemp("int8"), str(int8_folder)) as server:
        yield server
