"""docs/structure.md names every room, and nothing that is not there."""

from __future__ import annotations

import re
import subprocess
from pathlib import PurePosixPath

from tests.conftest import ROOT

TEXT = (ROOT / "docs/structure.md").read_text()
DESCRIBED = set(re.findall(r"`([\w/.-]+)`", TEXT))
MAX_LINES = 120


def tracked() -> set[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def test_every_room_is_described() -> None:
    """A folder of the product, and what stands beside the folders."""
    rooms = set()
    for name in tracked():
        path = PurePosixPath(name)
        if path.parts[0] in {"serve", "quantize"} and path.name != "__init__.py":
            rooms.add(name if len(path.parts) == 2 else str(path.parent))
    assert rooms - DESCRIBED == set()


def test_every_top_folder_is_described() -> None:
    tops = {name.split("/")[0] for name in tracked() if "/" in name}
    named = {name.rstrip("/").split("/")[0] for name in DESCRIBED}
    assert {top for top in tops if not top.startswith(".")} - named == set()


def test_everything_described_exists() -> None:
    paths = {word for word in DESCRIBED if "/" in word}
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_it_is_one_page() -> None:
    assert len(TEXT.splitlines()) <= MAX_LINES
