"""What the checks of deploy/ share.

A check takes the folder that has deploy/ in it and returns what is wrong, so that the same function
judges the repository and a copy that was broken on purpose.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import click
import pytest
import typer
import yaml
from yamllint import linter
from yamllint.config import YamlLintConfig

from packhorse.serve.cli import app
from packhorse.serve.errors import StartupError
from packhorse.serve.settings import Settings, load
from tests.conftest import ROOT
from tests.programs import missing, path_of

Check = Callable[[Path], list[str]]

# A name and a whole version; a digest may follow.
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")
SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|(API|ADMIN)_?KEY|CREDENTIAL", re.IGNORECASE)
# What has to be done after the drain: the engine ends, last words are said.
ENDING_S = 15
YAML_RULES = YamlLintConfig(
    "extends: default\n"
    "rules: {line-length: {max: 120}, document-start: disable, braces: disable,"
    " comments: {min-spaces-from-content: 2}, octal-values: disable,"
    " indentation: {indent-sequences: consistent}, truthy: {check-keys: false}}"
)


@dataclass(frozen=True)
class Breakage:
    """One thing that goes wrong by hand, and a word of what the check says of it."""

    name: str
    file: str
    old: str
    new: str
    said: str


def cases(*breakages: tuple[str, str, str, str, str]) -> list[Any]:
    """pytest's parameters."""
    return [pytest.param(Breakage(*each), id=each[0]) for each in breakages]


def copies(breakages: list[Any], *apart: str) -> list[Any]:
    """pytest's parameters again: breakages that go into one copy, as building and judging a copy
    takes longer than all else. Each string names those of one copy; the rest are in another.

    Apart is what keeps the check from looking further, or has the words that it says of another.
    """
    by_name = {each.id: each.values[0] for each in breakages}
    groups = [[by_name.pop(name) for name in names.split()] for names in apart]
    groups.append(list(by_name.values()))
    for group in groups:
        assert len({each.said for each in group}) == len(group), "who of them was reported?"
    return [pytest.param(group, id=f"{group[0].name}-{len(group)}") for group in groups]


def broken(folder: Path, breakages: list[Breakage]) -> Path:
    """A copy of what the checks read, with the breakages in it."""
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    for name in (".dockerignore", "docs/deploy.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for breakage in breakages:
        path = folder / breakage.file
        text = path.read_text()
        assert breakage.old in text, f"{breakage.name} is out of date"
        path.write_text(text.replace(breakage.old, breakage.new))
    return folder


def assert_reported(check: Check, folder: Path, breakages: list[Breakage]) -> None:
    problems = check(broken(folder, breakages))
    passed_over = [
        breakage.name for breakage in breakages
        if not any(breakage.said in problem for problem in problems)
    ]  # fmt: skip
    assert passed_over == [], problems


def yaml_problems(path: Path) -> list[str]:
    """What yamllint says: faults, names given twice, style."""
    return [f"{path.name}:{said}" for said in _linted(path.read_text())]


@cache  # most files of a broken copy are as before
def _linted(text: str) -> list[str]:
    return [f"{found.line}: {found.desc}" for found in linter.run(text, YAML_RULES)]


def read_settings(
    path: Path, given: dict[str, Any] | None = None
) -> tuple[Settings | None, list[str]]:
    """The settings as the server reads them; `given` comes from elsewhere."""
    try:
        return load(path, given or {}), []
    except StartupError as error:
        return None, [f"{path.name}: {error}"]


def settings_problems(
    path: Path, *, listens: str = "0.0.0.0", given: dict[str, Any] | None = None
) -> list[str]:
    """A server's settings file: taken by the server, with keys, listening where it is reached."""
    settings, problems = read_settings(path, given)
    if settings is None:
        return problems
    if settings.auth.keys_file is None:
        problems.append(f"{path.name}: without auth.keys_file everybody may infer")
    if settings.http.host != listens:
        problems.append(f"{path.name}: http.host is {settings.http.host}, not {listens}")
    if not settings.model:
        problems.append(f"{path.name}: no model")
    return problems


def command_problems(words: list[str]) -> list[str]:
    """Whether our command line takes `packhorse WORDS`; nothing is run."""
    group = _commands()
    try:
        context = group.make_context("packhorse", list(words), resilient_parsing=True)
        command = group.get_command(context, words[0])
        if command is None:
            return [f"packhorse has no command {words[0]}"]
        command.make_context(words[0], list(words[1:]), parent=context)
    except Exception as error:  # noqa: BLE001 # typer brings a click, and errors, of its own
        return [f"packhorse {' '.join(words)}: {getattr(error, 'message', error)}"]
    return []


@cache
def _commands() -> click.Group:
    return cast("click.Group", typer.main.get_command(app))


def config_of(words: list[str]) -> str | None:
    """The --config of a command line."""
    return words[words.index("--config") + 1] if "--config" in words[:-1] else None


def seconds(text: str | int) -> float:
    """`60`, `60s`, `1m30s`."""
    parts = re.findall(r"(\d+)([smh]?)", str(text))
    return sum(int(number) * {"": 1, "s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)


def output_of(*words: str | Path) -> tuple[int, str]:
    """Exit code, and all that was said."""
    program, *rest = map(str, words)
    done = subprocess.run(
        [path_of(program) or program, *rest],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "GOGC": "off"},  # kubectl spends a third of its time collecting garbage
    )
    return done.returncode, done.stdout + done.stderr


def documents(path: Path) -> list[Any]:
    loaded = yaml.load_all(path.read_text(), yaml.CSafeLoader)  # the slow one is slow
    return [each for each in loaded if each is not None]


def needs(tool: str) -> pytest.MarkDecorator:
    """Skip without it; the run's last paragraph says how to install it."""
    return pytest.mark.skipif(path_of(tool) is None, reason=missing(tool))
