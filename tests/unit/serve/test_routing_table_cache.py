"""Tables that outlive a restart: read when all they were made of is the same, else made anew."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from packhorse.serve.routing import table_cache as module
from packhorse.serve.routing.table_cache import MAX_TABLES, TableCache
from packhorse.serve.routing.train import Job, Trained, fit
from tests.unit.serve.routing_data import job

SMALL = job(20)


class Trainer:
    """Trains in this process, and counts."""

    def __init__(self) -> None:
        self.trained = 0

    async def __call__(self, given: Job) -> Trained:
        self.trained += 1
        return fit(given)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def test_the_same_examples_are_trained_once(tmp_path: Path) -> None:
    first, second = Trainer(), Trainer()
    trained = await TableCache(tmp_path / "tables", first)(SMALL)
    # In another order it is the same work.
    again = Job(dict(reversed(SMALL.adapters.items())), SMALL.none, SMALL.wrong_route_rate)
    assert await TableCache(tmp_path / "tables", second)(again) == trained
    assert (first.trained, second.trained) == (1, 0)
    assert len(files(tmp_path / "tables")) == 1


def other_prompt(given: Job) -> Job:
    prompts = [*given.adapters["cars"][:-1], "another"]
    return msgspec.structs.replace(given, adapters={**given.adapters, "cars": prompts})


@pytest.mark.parametrize(
    "change",
    [
        other_prompt,
        lambda given: msgspec.structs.replace(given, none=given.none[1:]),
        lambda given: msgspec.structs.replace(given, wrong_route_rate=0.02),
    ],
)
async def test_other_examples_are_trained(tmp_path: Path, change: Callable[[Job], Job]) -> None:
    trainer = Trainer()
    kept = TableCache(tmp_path, trainer)
    assert await kept(SMALL) is not None
    changed = change(SMALL)
    assert await kept(changed) == fit(changed)
    assert trainer.trained == 2


async def test_another_scikit_learn_or_other_code_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer()
    for made_with in (b"a", b"b"):
        monkeypatch.setattr(module, "_made_with", lambda with_=made_with: with_)
        await TableCache(tmp_path, trainer)(SMALL)
    assert trainer.trained == 2


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the table": lambda path: flip(path, -100),
    "a bit of the beginning": lambda path: flip(path, 3),
    "a bit of the key": lambda path: flip(path, len(module.MAGIC) + 2),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_text("hello"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_file_is_passed_over_with_one_line(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer()
    trained = await TableCache(tmp_path, trainer)(SMALL)
    (path,) = files(tmp_path)
    DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING):
        assert await TableCache(tmp_path, trainer)(SMALL) == trained
    assert trainer.trained == 2
    assert str(path) in caplog.records[0].getMessage()
    if damage != "a folder":  # which cannot be replaced, and is told a second time
        assert len(caplog.records) == 1
        await TableCache(tmp_path, trainer)(SMALL)
        assert trainer.trained == 2, "mended"


async def test_what_cannot_be_written_is_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    trained = await TableCache(tmp_path / "file" / "below", Trainer())(SMALL)
    assert trained == fit(SMALL)
    assert "cannot be kept" in caplog.text


async def test_the_newest_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".new-left-behind").write_text("by a server that was killed")
    kept = TableCache(tmp_path, Trainer())
    for number in range(MAX_TABLES + 2):
        before = set(files(tmp_path))
        await kept(msgspec.structs.replace(SMALL, wrong_route_rate=0.01 + number / 100))
        (new,) = set(files(tmp_path)) - before
        os.utime(new, (number, number))
    oldest, *_ = sorted(path.stat().st_mtime for path in files(tmp_path))
    assert len(files(tmp_path)) == MAX_TABLES
    assert oldest == 2
