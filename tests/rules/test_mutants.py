"""Patches of tests/mutants fit the tree and name tests that exist; tools/mutants.py runs them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools.mutants import PATCHES, git_apply, mutants, read

FILES = sorted(PATCHES.glob("*.patch"))
MAX_CHANGED_LINES = 6
MAX_WITH_ENGINE = 3


def test_there_are_enough_and_few_need_an_engine() -> None:
    found = mutants()
    assert len(found) >= 20
    assert sum(mutant.needs_engine for mutant in found) <= MAX_WITH_ENGINE
    numbers = [mutant.name.partition("-")[0] for mutant in found]
    assert numbers == [f"{number:02d}" for number in range(1, len(found) + 1)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_small_and_breaks_the_product(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    broken = {line.split("/", 1)[1] for line in lines if line.startswith("+++ b/")}
    assert {name.split("/")[0] for name in broken} <= {"serve", "quantize"}
    changed = [line for line in lines if re.match(r"[+-](?![+-]{2} )", line)]
    assert 1 <= len(changed) <= MAX_CHANGED_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_fits_the_tree(path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git applies the patches, and is not installed")
    git_apply(ROOT, path, "--check")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_names_tests_that_exist(path: Path) -> None:
    mutant = read(path)
    assert mutant.broken.endswith(".")
    assert mutant.tests
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert (ROOT / file).is_file(), f"{mutant.name} names {file}"
        if function:
            name = function.partition("[")[0]
            source = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), test
