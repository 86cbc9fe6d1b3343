"""Break the product in known ways, and see whether its tests notice: `make mutants`.

    python tools/mutants.py [--fast] [--table] [NAME ...]

A mutant is a patch of tests/mutants that breaks one behaviour, with two lines of its own on top:

    # what is broken, and what a user would suffer
    # tests: the tests that must fail, as pytest is told them

All named tests must pass on a copy of the working tree; then each patch is applied to that copy
alone, its tests run, and the patch is taken back. A mutant is found when one of them fails. Tests
that cannot be collected, that are not there or that end as errors in a fixture prove nothing: that
is a mistake of the patch. Ends with 1 when a mutant was missed or has such a mistake; those whose
tests are skipped on this machine are told.

Not covered: what no patch breaks. The tests named need not be the only ones that fail.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "tests/mutants"
PACKAGES = ("serve", "quantize")
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "--no-header", "-q")
LIMIT_S = 900.0
SHOWN_LINES = 30
FAILED = re.compile(r"^FAILED (\S+)", re.MULTILINE)
PASSED, TESTS_FAILED = 0, 1  # of pytest's exit codes


class BadMutant(Exception):
    """A patch that says nothing about the tests; the message says why."""


class NotHere(Exception):
    """Its tests need a program that is not installed."""


Outcome = Literal["found", "skipped", "MISSED", "ERROR"]


@dataclass(frozen=True)
class Mutant:
    """A patch and what its head says."""

    path: Path
    broken: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def needs_engine(self) -> bool:
        return any(test.startswith("tests/e2e") for test in self.tests)


@dataclass(frozen=True)
class Verdict:
    """`said` is the first test that failed, or why there is none."""

    mutant: Mutant
    outcome: Outcome
    took_s: float
    said: str


def read(path: Path) -> Mutant:
    """Raises BadMutant when the two lines are not there."""
    broken, tests, *_ = [*path.read_text(encoding="utf-8").splitlines(), "", ""]
    if not broken.startswith("# ") or not tests.startswith("# tests: tests/"):
        raise BadMutant(f"{path.name} does not begin with what is broken and `# tests: tests/...`")
    return Mutant(path, broken[2:].strip(), tuple(tests.removeprefix("# tests:").split()))


def mutants(names: Sequence[str] = ()) -> list[Mutant]:
    """All, or those with these names or numbers, in order. Raises BadMutant."""
    found = [read(path) for path in sorted(PATCHES.glob("*.patch"))]
    by_name = {mutant.name: mutant for mutant in found}
    by_name |= {mutant.name.partition("-")[0]: mutant for mutant in found}
    wanted = [Path(name).name.removesuffix(".patch") for name in names]
    if unknown := [name for name in wanted if name not in by_name]:
        raise BadMutant(f"there is no {', '.join(unknown)} in {PATCHES.relative_to(ROOT)}")
    return [by_name[name] for name in wanted] if names else found


def git_apply(folder: Path, patch: Path, *options: str) -> None:
    """Raises BadMutant when the patch does not fit."""
    command = ["git", "apply", *options, str(patch)]
    # Inside of some other repository, git would pass over files outside of that without a word.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BadMutant(f"does not apply: {' '.join(done.stderr.split())}")


class Copy:
    """The working tree in another folder, whose tests see that folder's packages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            # Two versions of a file within a second may have the same size and time.
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in listed.stdout.split("\0"):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._check_imports()

    def _check_imports(self) -> None:
        """The packages are installed from the working tree too, and must not come from there."""
        for package in PACKAGES:
            code = f"import {package}; print({package}.__file__)"
            done = self._python("-c", code, timeout_s=LIMIT_S)
            wanted = self._folder / package / "__init__.py"
            if done.stdout.strip() != str(wanted):
                raise SystemExit(f"{package} is not {wanted}, but {done.stdout}{done.stderr}")

    def _python(self, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def check_unbroken(self, tests: Sequence[str]) -> None:
        """Ends the program unless all of them pass."""
        done = self._python(*PYTEST, *tests, timeout_s=len(tests) * LIMIT_S)
        if done.returncode != PASSED:
            raise SystemExit(f"Without any patch, not all tests pass:\n{done.stdout}")

    def judge(self, mutant: Mutant) -> Verdict:
        started_s = time.monotonic()
        outcome: Outcome = "ERROR"
        try:
            git_apply(self._folder, mutant.path)
            try:
                found = self._failed_test(mutant.tests)
            finally:
                git_apply(self._folder, mutant.path, "--reverse")
            outcome, said = ("found", found) if found else ("MISSED", "all its tests pass")
        except NotHere as error:
            outcome, said = "skipped", str(error)
        except BadMutant as error:
            said = str(error)
        return Verdict(mutant, outcome, time.monotonic() - started_s, said)

    def _failed_test(self, tests: Sequence[str]) -> str | None:
        """The first that fails; None when they pass. Raises NotHere when all are skipped, BadMutant
        when pytest ends in another way.
        """
        try:
            done = self._python(*PYTEST, "--exitfirst", *tests, timeout_s=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise BadMutant(f"its tests do not end within {LIMIT_S:.0f} s") from None
        failed = FAILED.search(done.stdout)
        if done.returncode == TESTS_FAILED and failed is not None:
            return failed[1]
        if done.returncode == PASSED:
            if re.search(r"\d+ passed", done.stdout):
                return None
            raise NotHere("all its tests are skipped on this machine")
        last = "\n".join(done.stdout.splitlines()[-SHOWN_LINES:])
        raise BadMutant(f"pytest ended with {done.returncode}, and no test failed:\n{last}")


def short(test: str) -> str:
    """`tests/unit/test_a.py::test_b[c]` -> `test_b`; a file stays one."""
    return test.rpartition("::")[2].partition("[")[0]


def markdown(chosen: Sequence[Mutant]) -> str:
    rows = "".join(
        f"| {mutant.name.partition('-')[0]} | {mutant.broken} "
        f"| {', '.join(f'`{test}`' for test in mutant.tests)} |\n"
        for mutant in chosen
    )
    return f"| | what is broken | found by |\n|---|---|---|\n{rows}"


def table(verdicts: Sequence[Verdict]) -> str:
    width = max(len(verdict.mutant.name) for verdict in verdicts)
    return "\n".join(
        f"{verdict.outcome:7}  {verdict.mutant.name:{width}}  {verdict.took_s:4.0f} s  "
        f"{verdict.mutant.broken}"
        for verdict in verdicts
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the product; the tests must notice.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants, or their numbers")
    parser.add_argument("--fast", action="store_true", help="without those that need an engine")
    parser.add_argument("--table", action="store_true", help="a Markdown table, and run nothing")
    options = parser.parse_args()
    try:
        chosen = mutants(options.names)
    except BadMutant as error:
        parser.error(str(error))
    if options.fast:
        chosen = [mutant for mutant in chosen if not mutant.needs_engine]
    if options.table:
        print(markdown(chosen), end="")
        return 0
    if not chosen:
        print("nothing to do")
        return 0
    started_s = time.monotonic()
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder).resolve())
        copy.check_unbroken(sorted({test for mutant in chosen for test in mutant.tests}))
        print(f"unbroken, all tests pass: {time.monotonic() - started_s:.0f} s", flush=True)
        for mutant in chosen:
            verdict = copy.judge(mutant)
            verdicts.append(verdict)
            said = short(verdict.said) if verdict.outcome == "found" else verdict.said
            print(f"{verdict.outcome:7} {mutant.name}  {verdict.took_s:.0f} s  {said}", flush=True)
    found = sum(verdict.outcome == "found" for verdict in verdicts)
    wrong = sum(verdict.outcome in ("MISSED", "ERROR") for verdict in verdicts)
    print(f"\n{table(verdicts)}" if verdicts else "")
    print(f"{found} of {len(verdicts)} found in {time.monotonic() - started_s:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
