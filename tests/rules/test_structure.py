"""docs/structure.md names every folder and module, and nothing that is not there."""

from __future__ import annotations

import re
import subprocess

from tests.conftest import ROOT

TEXT = (ROOT / "docs/structure.md").read_text()


def tracked() -> set[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def test_every_module_is_described() -> None:
    modules = {
        name for name in tracked()
        if name.startswith(("quantize/", "serve/", "demo/", "tools/", "bench/"))
        and name.endswith(".py") and not name.endswith("__init__.py")
    }  # fmt: skip
    described = set(re.findall(r"`([\w/.-]+)`", TEXT))
    assert modules - described == set()


def test_everything_described_exists() -> None:
    paths = {word for word in re.findall(r"`([\w/.-]+)`", TEXT) if "/" in word}
    assert {path for path in paths if not (ROOT / path).exists()} == set()
