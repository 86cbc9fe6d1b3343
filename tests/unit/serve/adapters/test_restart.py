"""What a restart does with what was registered: read little, write nothing, and load nothing that
is not what was stored.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.adapters import copies, lora_cache, registry
from packhorse.serve.adapters import store as stores
from packhorse.serve.adapters.folder_watch import FolderWatch
from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.adapters.store import AdapterStore
from packhorse.serve.errors import Unavailable
from tests.unit.serve.adapters.loader import CLINIC, CLINIC_2, CODE, Engine, registry_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@asynccontextmanager
async def restarted(
    folder: Path, limits: AdapterLimits, *, engine: Engine | None = None, **options: Any
) -> AsyncIterator[tuple[Registry, FolderWatch]]:
    """On the store and the watched folder in `folder`."""
    store = AdapterStore(folder / "store")
    try:
        found = await registry_of(store, engine or Engine(), limits, **options)
        watch = FolderWatch(folder / "adapters", found)
        await watch.look(wait=False)
        yield found, watch
        await found.settle()
    finally:
        store.close()


def state_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Whatever a write would change. `.lock` is opened at each start."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns, path.stat().st_ctime_ns, path.stat().st_ino,
        )
        for path in sorted([folder, *folder.rglob("*")])
        if path.name != ".lock"
    }  # fmt: skip


@pytest.fixture
async def served(tmp_path: Path, limits: AdapterLimits) -> Path:
    """A folder where two adapters are watched and one was added by an operator."""
    for name, source in (("clinic", CLINIC), ("code", CODE)):
        shutil.copytree(source, tmp_path / "adapters" / name)
    async with restarted(tmp_path, limits) as (found, _):
        await found.put("by-hand", CLINIC_2, replace=False)
    return tmp_path


class Reads:
    """Which copies were read whole, and by whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at_start: list[str] = []
        self.for_the_engine: list[str] = []
        self.judged: list[str] = []
        self.staged: list[str] = []
        for module, seen in ((stores, self.at_start), (lora_cache, self.for_the_engine)):
            monkeypatch.setattr(module, "check_copy", self._noting(copies.check_copy, seen, -2))
        monkeypatch.setattr(stores, "check", self._noting(stores.check, self.judged, -2))
        stage = AdapterStore.stage

        def staging(store: AdapterStore, name: str, *more: Any, **named: Any) -> Any:
            self.staged.append(name)
            return stage(store, name, *more, **named)

        monkeypatch.setattr(AdapterStore, "stage", staging)

    @staticmethod
    def _noting(real: Callable[..., Any], seen: list[str], part: int) -> Callable[..., Any]:
        def noting(folder: Any, *more: Any) -> Any:
            seen.append(Path(getattr(folder, "folder", folder)).parts[part])
            return real(folder, *more)

        return noting


@pytest.fixture
def reads(served: Path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


async def test_a_restart_writes_nothing_and_reads_for_the_engine_alone(
    served: Path, limits: AdapterLimits, reads: Reads
) -> None:
    before = state_of(served)
    engine = Engine()
    async with restarted(served, limits, engine=engine) as (found, watch):
        assert found.names == ["clinic", "code", "by-hand"]
        await watch.look()
        await watch.look()
        assert {card.state for card in found.cards()} == {"resident"}
    assert (reads.at_start, reads.judged, reads.staged) == ([], [], [])
    assert sorted(reads.for_the_engine) == ["by-hand", "clinic", "code"]
    assert engine.loads == 3
    assert state_of(served) == before


async def test_no_more_than_the_engine_has_room_for_is_loaded(
    served: Path, limits: AdapterLimits
) -> None:
    engine = Engine()
    async with restarted(served, limits, engine=engine, resident=2) as (found, _):
        assert engine.loads == 2
        assert sorted(card.state for card in found.cards()) == ["resident", "resident", "staged"]


async def test_pinned_ones_are_there_before_ready_and_others_after(
    served: Path, limits: AdapterLimits
) -> None:
    async with restarted(served, limits) as (found, _):
        await found.pin("code", pinned=True)
    engine = Engine()
    store = AdapterStore(served / "store")
    again = Registry(store, max_registered=10, max_resident=8)
    engine.gate.clear()
    starting = asyncio.create_task(again.start(engine, limits, slots=2))
    while not engine.at_once:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert not starting.done()
    engine.gate.set()
    await starting
    assert {adapter.name for adapter in engine.loaded.values()} == {"code"}
    await again.warm()
    assert {adapter.name for adapter in engine.loaded.values()} == {"clinic", "code", "by-hand"}
    store.close()


async def test_one_that_is_removed_while_others_are_loaded_is_not(
    served: Path, limits: AdapterLimits
) -> None:
    engine = Engine()
    store = AdapterStore(served / "store")
    again = Registry(store, max_registered=10, max_resident=8)
    engine.gate.clear()
    await again.start(engine, limits, slots=2)
    warming = asyncio.create_task(again.warm())
    while not engine.at_once:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    removing = asyncio.create_task(again.remove("code"))
    await asyncio.sleep(0)
    engine.gate.set()
    await removing
    await warming
    assert engine.loads == 2
    assert {adapter.name for adapter in engine.loaded.values()} == {"clinic", "by-hand"}
    store.close()


def flip(path: Path) -> None:
    """A bit of the last number, with the size and the modification time as they were."""
    facts = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x01
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def stored(folder: Path, name: str, file: str) -> Path:
    (path,) = (folder / "store" / name).glob(f"*/{file}")
    return path


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
async def test_a_copy_that_was_changed_is_not_loaded_and_comes_back_from_its_source(
    served: Path, limits: AdapterLimits, reads: Reads, file: str
) -> None:
    flip(stored(served, "clinic", file))
    flip(stored(served, "by-hand", file))
    engine = Engine()
    async with restarted(served, limits, engine=engine) as (found, _):
        assert found.card("by-hand").state == "failed"
        assert "is not what it was" in str(found.card("by-hand").reason)
        assert found.card("clinic").state == "resident", "staged again by the watch"
        digest = found.card("clinic").digest
    assert sorted({*reads.at_start}) == ["by-hand", "clinic"]
    assert reads.staged == ["clinic"]
    assert digest is not None
    copies.check_copy(served / "store" / "clinic" / digest, digest)
    assert not list((served / "store").glob(".staging-*"))


async def test_a_change_that_leaves_no_trace_is_noticed_before_the_engine(
    served: Path, limits: AdapterLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses bits changes no time."""
    flip(stored(served, "by-hand", WEIGHTS))
    known = json.loads((served / "store" / copies.MEMORY).read_bytes())
    for place, line in known.items():
        line["facts"] = copies.facts_of(served / "store" / place)
    (served / "store" / copies.MEMORY).write_text(json.dumps(known))
    engine = Engine()
    async with restarted(served, limits, engine=engine) as (found, _):
        assert "is not what it was" in str(found.card("by-hand").reason)
        lease = found.lease("by-hand")
        with pytest.raises(Unavailable, match="log says"):
            await lease.ready(10, 10)
        lease.release()
        assert {adapter.name for adapter in engine.loaded.values()} == {"clinic", "code"}
        await found.put("by-hand", CLINIC_2, replace=True)  # what the message says to do
        assert found.card("by-hand").state == "resident"
        assert found.card("by-hand").reason is None


def memory_lost(store: Path) -> None:
    """As in a store of a server before there was one."""
    (store / copies.MEMORY).unlink()


def memory_broken(store: Path) -> None:
    (store / copies.MEMORY).write_bytes(b'{"clinic/')


def memory_of_another(store: Path) -> None:
    (store / copies.MEMORY).write_text('{"clinic/0": {"facts": "none"}}')


def restored(store: Path) -> None:
    """From a backup: other inodes and times."""
    shutil.copytree(store, store.with_name("backup"))
    shutil.rmtree(store)
    store.with_name("backup").rename(store)


@pytest.mark.parametrize("change", [memory_lost, memory_broken, memory_of_another, restored])
async def test_without_its_memory_a_start_reads_all_once(
    served: Path, limits: AdapterLimits, reads: Reads, change: Callable[[Path], None]
) -> None:
    change(served / "store")
    async with restarted(served, limits) as (found, _):
        assert found.names == ["clinic", "code", "by-hand"]
    assert {*reads.at_start} == {"clinic", "code", "by-hand"}
    reads.at_start.clear()
    reads.staged.clear()
    before = state_of(served / "store")
    async with restarted(served, limits) as (found, _):
        assert found.names == ["clinic", "code", "by-hand"]
    assert (reads.at_start, reads.staged) == ([], [])
    assert state_of(served / "store") == before


async def test_other_limits_are_looked_at_again(
    served: Path, limits: AdapterLimits, reads: Reads
) -> None:
    lower = dataclasses.replace(limits, max_rank=4)
    assert lower.key != limits.key
    assert dataclasses.replace(limits, layers={}).key != limits.key
    async with restarted(served, lower) as (found, _):
        assert {card.state for card in found.cards()} == {"failed"}
    assert reads.at_start == [], "what they hold is known"
    async with restarted(served, limits) as (found, _):
        assert {card.state for card in found.cards()} == {"resident"}


async def test_a_source_that_changed_while_the_server_was_down_is_taken(
    served: Path, limits: AdapterLimits, reads: Reads
) -> None:
    shutil.copytree(CLINIC_2, served / "adapters" / "clinic", dirs_exist_ok=True)
    async with restarted(served, limits) as (found, _):
        by_hand = found.card("by-hand").digest
        assert found.card("clinic").digest == by_hand, "both are the second version"
    assert reads.staged == ["clinic"]


async def test_what_an_operator_put_in_a_watched_ones_place_lasts_until_a_restart(
    served: Path, limits: AdapterLimits
) -> None:
    async with restarted(served, limits) as (found, watch):
        before = found.card("clinic").digest
        await found.put("clinic", CLINIC_2, replace=True)
        await watch.look()
        assert found.card("clinic").digest != before
    async with restarted(served, limits) as (found, _):
        assert found.card("clinic").digest == before


async def test_the_same_again_is_read_and_not_written(
    served: Path, limits: AdapterLimits, reads: Reads
) -> None:
    """As when a volume comes with other inodes after each restart."""
    shutil.copytree(served / "adapters", served / "copy")
    shutil.rmtree(served / "adapters")
    (served / "copy").rename(served / "adapters")

    def kept() -> dict[str, tuple[int, ...]]:
        return {
            name: state for name, state in state_of(served / "store").items()
            if name.count("/") == 2 or name == stores.INDEX
        }  # fmt: skip

    before = kept()
    assert before
    async with restarted(served, limits):
        pass
    assert sorted(reads.staged) == ["clinic", "code"]
    assert kept() == before


def test_what_is_registered_is_read_by_servers_before(served: Path) -> None:
    """What is known of the copies is in a file of its own: they refuse fields they do not know."""
    lines = json.loads((served / "store" / stores.INDEX).read_bytes())
    assert {tuple(line) for line in lines} == {("name", "digest", "rank", "pinned")}
    assert registry.Registration.__struct_config__.forbid_unknown_fields
