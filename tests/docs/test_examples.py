"""The examples of the pages for users run, in the order of the page, as a reader would run them.

Each page has a folder of its own that looks like a checkout after `make demo`. What differs from a
reader's machine stands in three tables: `SETTINGS` (the echo engine in vLLM's place), `ADDED`
(options that spare minutes) and `Reader.addresses` (the ports that the servers really have).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from packhorse.serve.access.keys import read_keys
from packhorse.serve.routing.config import read_routes
from packhorse.serve.settings import load
from tests.conftest import BIN, DEMO, ROOT, running_server
from tests.docs.examples import NOT_RUN, RUN, Block, blocks_of, task_of, user_pages

PAGES = user_pages()
LINKED = ("demo", "deploy", "examples", "proto")
"""Folders of the checkout that examples read."""
ADAPTERS = ("clinic", "ledger", "code")
"""Those that `make demo` copies to out/adapters."""
SETTINGS = {"PACKHORSE_ENGINE__KIND": "echo"}
ADDED = {
    "packhorse batch questions.jsonl --model": "--engine echo",
    "quantize model": "--no-verify --no-quality --calibration-tokens 2048 --force",
}
"""Options that are added to commands: no load check in vLLM, little calibration text, no vLLM where
a command and not a server has it.
"""
CURL = "fail-with-body\nsilent\nshow-error\n"
"""~/.curlrc: an answer whose status is an error fails the example."""
MADE_BEFORE = {
    "out/demo-gptq": "quantize model demo/model --method gptq --out out/demo-gptq",
    "out/demo-int8": "quantize model demo/model --method int8 --out out/demo-int8",
}
"""Folders that a reader has from another page, for `quantize report`, and how they are made."""
LONG = ("docs/quantize.md", "docs/quality-report.md")
"""They quantize the demo model in several ways; README.md does it once."""
OUTPUT = ("text", "json")
"""Languages of blocks that show what comes out."""
NAMED_TEST = re.compile(r"`(?=\w|::)(tests/(?:\w+/)*)?(test_\w+\.py)?(?:::(test_\w+))?`")
READERS: dict[str, Callable[[Path], object]] = {
    "packhorse.yaml": lambda path: load(path, {}),
    "keys.yaml": read_keys,
    "routes.yaml": read_routes,
}
"""File name in the first line of a `yaml` block -> what reads such a file."""


class Reader:
    """Goes through the blocks of a page. One server at a time: the next one replaces it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.addresses: dict[str, str] = {}
        self._servers = ExitStack()
        home = {"HOME": str(folder / "home"), "PATH": f"{BIN}:{os.environ['PATH']}"}
        self._environment = {**os.environ, **home}
        (folder / "home").mkdir()
        (folder / "home/.curlrc").write_text(CURL)
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        for name in ADAPTERS:
            shutil.copytree(DEMO / "adapters" / name, folder / "out/adapters" / name)

    def close(self) -> None:
        self._servers.close()

    def follow(self, block: Block) -> None:
        follow = {"python": self._python, "yaml": self._yaml}.get(block.language, self._shell)
        follow(block)

    def _shell(self, block: Block) -> None:
        lines: list[str] = []
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.startswith("packhorse serve "):
                self._bash(lines, block)
                lines = []
                self._serve(shlex.split(line, comments=True)[2:])
            else:
                lines.append(line)
        self._bash(lines, block)

    def _bash(self, lines: list[str], block: Block) -> None:
        """Run lines; what they export is there in later blocks, and for servers."""
        for number, line in enumerate(lines):
            for command, options in ADDED.items():
                if line.startswith(command):
                    said, mark, comment = line.partition(" #")
                    lines[number] = f"{said} {options}{mark}{comment}"
        if any(line.startswith("quantize report ") for line in lines):
            made = " ".join(lines)
            missing = [
                command
                for name, command in MADE_BEFORE.items()
                if name in made
                and f"--out {name}" not in made
                and not (self.folder / name).exists()
            ]
            if missing:
                self._bash(missing, block)
        script = "\n".join(["set -euo pipefail", *lines, 'env -0 > "$HOME/environment"'])
        self._run(["bash", "-c", self._substituted(script)], block)
        told = (self.folder / "home/environment").read_bytes().decode().split("\0")
        self._environment = dict(each.split("=", 1) for each in told if each)

    def _serve(self, arguments: list[str]) -> None:
        self._servers.close()
        if "out/demo-int8" in arguments and not (self.folder / "out/demo-int8").exists():
            shutil.copytree(DEMO / "model", self.folder / "out/demo-int8")
        if "--grpc-port" in arguments:
            arguments[arguments.index("--grpc-port") + 1] = "0"
        server = self._servers.enter_context(
            running_server(
                self.folder,
                *arguments,
                environment={**self._environment, **SETTINGS},
                cache=True,
                fresh=True,
            )
        )
        self.addresses["127.0.0.1:8000"] = server.url.removeprefix("http://")
        if found := re.search(r"gRPC at (\S+)", server.log()):
            self.addresses["127.0.0.1:50051"] = found[1]

    def _python(self, block: Block) -> None:
        self._run([sys.executable, "-c", self._substituted(block.text)], block)

    def _yaml(self, block: Block) -> None:
        (self.folder / block.name).write_text(block.text)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            READERS[block.name](self.folder / block.name)

    def _substituted(self, text: str) -> str:
        for said, real in self.addresses.items():
            text = text.replace(said, real)
        return text

    def _run(self, command: list[str], block: Block) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        told = f"{block.page}:{block.line} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, told


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.close()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.thorough] if page in LONG else []) for page in PAGES],
)
def test_examples_run(page: str, reader: Reader) -> None:
    for block in blocks_of(page):
        if block.runs:
            reader.follow(block)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_a_task_and_an_example_that_runs(page: str) -> None:
    assert task_of(page)
    assert blocks_of(page)[0].runs


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    for block in blocks_of(page):
        where = f"{block.page}:{block.line}"
        assert block.language in (*RUN, *OUTPUT), f"{where}: a language, or `text` for output"
        assert block.language in RUN or not block.not_run, f"{where}: output needs no reason"
        if block.language == "yaml" and block.runs:
            assert block.name in READERS, f"{where}: begins with the comment `# packhorse.yaml`"


def test_what_is_not_run_is_found_in_the_text() -> None:
    """A reason that stands elsewhere than directly above its block would mark nothing."""
    for page in PAGES:
        reasons = (ROOT / page).read_text(encoding="utf-8").count(NOT_RUN)
        assert reasons == sum(bool(block.not_run) for block in blocks_of(page)), page


def test_tests_that_pages_name_exist() -> None:
    """`tests/FOLDER/test_FILE.py::test_NAME`; later on the page the folder, or all but the test,
    may be left out.
    """
    missing = []
    for page in PAGES:
        folders: dict[str, str] = {}
        name = ""
        text = (ROOT / page).read_text(encoding="utf-8")
        for folder, said, test in NAMED_TEST.findall(text):
            name = said or name
            if folder:
                folders[name] = folder
            file = ROOT / folders.get(name, "") / name
            if not file.is_file() or (test and f"def {test}(" not in file.read_text()):
                missing.append(f"{page}: {name}::{test}")
    assert missing == []
