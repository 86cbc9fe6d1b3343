"""The INT8 demo model, and one real vLLM server on it for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import BIN, DEMO, FORK_SERVER, Process, Server, running_server, start
from tests.e2e.adapted import arguments, make_folder
from tests.e2e.questions import QUESTIONS, Score, ask_all

# Without it vLLM's CPU build has no 8-bit KV cache, and for 4-bit weights no kernel but ours.
AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text()
needs_avx512 = pytest.mark.skipif(
    not AVX512, reason="NOT TESTED HERE: this CPU has no AVX-512, and vLLM no kernel without it"
)

REPORTED_EVERY = 8
"""One of so many questions and texts is in the INT8 model's report."""
INT8 = pytest.StashKey["Making"]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """vLLM is imported now; the INT8 model is made while the first tests run."""
    if session.config.option.collectonly:
        return
    FORK_SERVER.start()
    if any("int8_folder" in getattr(item, "fixturenames", ()) for item in session.items):
        folder = Path(tempfile.mkdtemp(prefix="packhorse-int8-"))
        making = session.config.stash[INT8] = begin_int8(folder)

        def clean_up() -> None:
            making.process.kill()
            shutil.rmtree(folder, ignore_errors=True)

        session.config.add_cleanup(clean_up)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the shared servers last, and what ends servers after that: they stay up from the
    first of them on, and other modules start engines of their own. One at a time, see
    docs/lab-log.md.
    """

    def place(item: pytest.Item) -> int:
        used = getattr(item, "fixturenames", ())
        if item.path.name == "test_shutdown.py":
            return 3
        return 2 if "int8_server" in used else 1 if "demo_server" in used else 0

    items.sort(key=place)


@dataclass
class Making:
    """`quantize model demo/model`, run as a user runs it; `wait` returns the folder it made."""

    process: Process
    log: Path
    out: Path

    @classmethod
    def begin(cls, method: str, folder: Path, *options: str) -> Making:
        out = folder / f"demo-{method}"
        command = [BIN / "quantize", "model", DEMO / "model", "--method", method, "--out", out]
        words = [*map(str, command), "--no-verify", *options]
        path = folder / "quantize.log"
        with path.open("wb") as log:
            process = start(words, folder, log.fileno(), dict(os.environ), fresh=False)
        return cls(process, path, out)

    def wait(self) -> Path:
        code = self.process.wait(600)
        assert code == 0, self.log.read_text(encoding="utf-8", errors="replace")[-4000:]
        return self.out


def begin_int8(folder: Path) -> Making:
    """A part of the usual text and questions: enough for what is tested here, in minutes less."""
    options = ["--calibration-tokens", "16384", "--force"]
    for option, file in (("--eval", "general.jsonl"), ("--text", "held_out_text.jsonl")):
        lines = (DEMO / "eval" / file).read_text(encoding="utf-8").splitlines()
        (folder / file).write_text("\n".join(lines[::REPORTED_EVERY]), encoding="utf-8")
        options += [option, str(folder / file)]
    return Making.begin("int8", folder, *options)


# For the session: tests of other packages come in between, see above.
@pytest.fixture(scope="session")
def int8_folder(pytestconfig: pytest.Config) -> Path:
    return pytestconfig.stash[INT8].wait()


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits, in the GPTQ layout."""
    folder = tmp_path_factory.mktemp("rtn")
    return Making.begin("rtn", folder, "--no-quality", "--format", "gptq").wait()


@pytest.fixture(scope="package")
def adapters_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_folder(folder)
    return folder


@pytest.fixture(scope="package")
def adapters_server(int8_folder: Path, adapters_folder: Path) -> Iterator[Server]:
    """Of test_adapter_turns.py and test_adapters.py, whose last test stops it."""
    with running_server(adapters_folder, *arguments(int8_folder, adapters_folder)) as server:
        yield server


@pytest.fixture(scope="package")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The original, which calls tools."""
    arguments = (str(DEMO / "model"), "--served-model-name", "demo", "--tool-call-parser", "hermes")
    # test_shutdown.py kills its engine many times.
    environment = {
        "PACKHORSE_SUPERVISOR__MAX_RESTARTS": "100",
        "PACKHORSE_SUPERVISOR__BACKOFF_S": "0",
        "PACKHORSE_ENGINE__STALL_TIMEOUT_S": "5",
    }
    folder = tmp_path_factory.mktemp("demo")
    arguments += ("--batches", str(folder / "batches"))
    with running_server(folder, *arguments, environment=environment) as server:
        yield server


@pytest.fixture(scope="package")
def base_score(demo_server: Server) -> Score:
    """The original's score, on every second question: the benchmarks ask all."""
    return ask_all(demo_server, QUESTIONS[::2])


@pytest.fixture(scope="package")
def int8_server(
    int8_folder: Path, base_score: Score, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The server of most tests."""
    folder = tmp_path_factory.mktemp("int8")
    with running_server(folder, str(int8_folder), cache=True) as server:  # as users start it
        yield server
