"""Versions: added, replaced, removed, kept over restarts."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import closing
from pathlib import Path

import pytest

from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.adapters.store import AdapterStore
from packhorse.serve.errors import (
    Conflict,
    Invalid,
    NotFound,
    StartupError,
    Unavailable,
    UnknownModel,
)
from packhorse.serve.metrics import ModelMetrics
from tests.unit.serve.adapters.loader import CLINIC, CLINIC_2, CODE, Engine, registry_of


def inside(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def cut_short(folder: Path) -> None:
    (weights,) = folder.glob("clinic/*/adapter_model.safetensors")
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-10])


async def test_what_was_added_is_in_the_engine(registry: Registry, engine: Engine) -> None:
    card = await registry.put("clinic", CLINIC, replace=False)
    assert (card.state, card.rank, card.requests, card.reason) == ("resident", 8, 0, None)
    assert card.digest is not None
    lease = registry.lease("clinic")
    await lease.ready(10, 10)
    assert engine.names == {f"clinic@{card.digest[:12]}"}
    assert registry.card("clinic").requests == 1
    assert lease.adapter.folder.parent.parent.name == "store"
    lease.release()
    lease.release()
    assert registry.card("clinic").requests == 0


async def test_a_request_ends_on_the_version_it_began_with(
    registry: Registry, engine: Engine, folder: Path
) -> None:
    await registry.put("clinic", CLINIC, replace=False)
    old = registry.lease("clinic")
    await registry.put("clinic", CLINIC_2, replace=True)
    new = registry.lease("clinic")
    assert old.adapter.engine_name != new.adapter.engine_name
    assert engine.names == {old.adapter.engine_name, new.adapter.engine_name}
    assert [card.state for card in registry.cards()] == ["resident", "draining"]
    old.release()
    await registry.settle()
    assert engine.names == {new.adapter.engine_name}
    assert not old.adapter.folder.exists()
    assert new.adapter.folder.exists()
    assert [card.state for card in registry.cards()] == ["resident"]


async def test_an_old_version_that_comes_back_keeps_its_number(
    registry: Registry, engine: Engine
) -> None:
    """vLLM takes two adapters of one name for one."""
    await registry.put("clinic", CLINIC, replace=False)
    first = registry.lease("clinic")
    await registry.put("clinic", CLINIC_2, replace=True)
    await registry.put("clinic", CLINIC, replace=True)
    again = registry.lease("clinic")
    assert again.adapter == first.adapter
    first.release()
    again.release()
    await registry.settle()
    assert engine.names == {first.adapter.engine_name}


async def test_many_replacements_leave_one(
    registry: Registry, engine: Engine, folder: Path
) -> None:
    await registry.put("clinic", CLINIC, replace=False)
    leases = []
    # Eight rounds: seven versions are in use at once, and all are let go of with the seventh.
    for number in range(56):
        leases.append(registry.lease("clinic"))
        await registry.put("clinic", (CLINIC_2, CLINIC)[number % 2], replace=True)
        if number % 7 == 0:
            while leases:
                leases.pop().release()
    for lease in leases:
        lease.release()
    await registry.settle()
    assert len(engine.loaded) == 1
    assert len(inside(folder / "clinic")) == 1


async def test_the_same_again_changes_nothing(registry: Registry, engine: Engine) -> None:
    before = await registry.put("clinic", CLINIC, replace=False)
    after = await registry.put("clinic", CLINIC, replace=True, pinned=True)
    assert after.digest == before.digest
    assert after.pinned
    assert engine.loads == 1


async def test_names_are_taken_once(registry: Registry) -> None:
    await registry.put("clinic", CLINIC, replace=False)
    with pytest.raises(Conflict, match="replace=true"):
        await registry.put("clinic", CODE, replace=False)
    for name in ("demo", "auto"):
        with pytest.raises(Invalid, match="something else"):
            await registry.put(name, CODE, replace=False)
    for name in ("", "../up", "a/b", ".hidden", "x" * 65, "a\nb", "ü"):
        with pytest.raises(Invalid, match="choose another"):
            await registry.put(name, CODE, replace=False)


async def test_a_bad_replacement_leaves_the_old_one(
    registry: Registry, engine: Engine, tmp_path: Path
) -> None:
    await registry.put("clinic", CLINIC, replace=False)
    with pytest.raises(Invalid):
        await registry.put("clinic", tmp_path / "nothing", replace=True)
    engine.refusing.add("clinic")
    with pytest.raises(Invalid, match="does not like"):
        await registry.put("clinic", CLINIC_2, replace=True)
    await registry.settle()
    card = registry.card("clinic")
    assert card.state == "resident"
    assert card.reason is not None
    assert "does not like" in card.reason
    registry.lease("clinic").release()
    assert len(engine.loaded) == 1


async def test_a_bad_new_one_is_listed_and_not_served(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(Invalid):
        await registry.put("clinic", tmp_path / "nothing", replace=False)
    assert registry.card("clinic").state == "failed"
    assert registry.names == []
    with pytest.raises(UnknownModel, match="failed"):
        registry.lease("clinic")
    await registry.put("clinic", CLINIC, replace=False)
    assert registry.card("clinic").reason is None


async def test_removed_when_the_last_request_ends(
    registry: Registry, engine: Engine, folder: Path
) -> None:
    await registry.put("clinic", CLINIC, replace=False)
    lease = registry.lease("clinic")
    await registry.remove("clinic")
    with pytest.raises(UnknownModel):
        registry.lease("clinic")
    with pytest.raises(NotFound):
        registry.card("clinic")
    assert engine.loaded
    lease.release()
    await registry.settle()
    assert not engine.loaded
    assert not (folder / "clinic").exists()


def series(metrics: ModelMetrics) -> set[str]:
    """The names that packhorse_adapter_requests_waiting has."""
    (family,) = metrics.adapter_waiting.collect()
    return {sample.labels["adapter"] for sample in family.samples}


async def test_the_names_in_metrics_are_those_of_adapters(
    registry: Registry, engine: Engine, tmp_path: Path, metrics: ModelMetrics
) -> None:
    """Of old versions too, as long as a request of one may wait."""
    await registry.put("clinic", CLINIC, replace=False)
    with pytest.raises(Invalid):
        await registry.put("bad", tmp_path / "nothing", replace=False)
    engine.refusing.add("code")
    with pytest.raises(Invalid):
        await registry.put("code", CODE, replace=False)
    await registry.remove("code")
    await registry.settle()
    assert series(metrics) == {"clinic"}
    lease = registry.lease("clinic")
    await registry.put("clinic", CLINIC_2, replace=True)
    await registry.remove("clinic")
    await registry.settle()
    assert series(metrics) == {"clinic"}
    lease.release()
    await registry.settle()
    assert series(metrics) == set()


async def test_requests_that_wait_are_counted_by_adapter(
    registry: Registry, metrics: ModelMetrics
) -> None:
    """Two slots."""
    for name, source in (("clinic", CLINIC), ("code", CODE), ("clinic-2", CLINIC_2)):
        await registry.put(name, source, replace=False)
    leases = [registry.lease(name) for name in ("clinic", "code", "clinic-2")]
    for lease in leases[:2]:
        await lease.ready(10, 10)
    waiting = asyncio.create_task(leases[2].ready(10, 10))
    await asyncio.sleep(0)
    assert metrics.adapters_waiting() == {"clinic-2": 1}
    leases[0].release()
    await waiting
    assert metrics.adapters_waiting() == {}
    for lease in leases:
        lease.release()


async def test_a_restart_brings_them_back(
    store: AdapterStore, engine: Engine, limits: AdapterLimits, folder: Path
) -> None:
    before = await registry_of(store, engine, limits)
    await before.put("clinic", CLINIC, replace=False, pinned=True)
    await before.put("code", CODE, replace=False)
    store.close()
    (folder / ".staging-left").mkdir()
    (folder / "old" / ("0" * 64)).mkdir(parents=True)
    with closing(AdapterStore(folder)) as reopened:
        after = await registry_of(reopened, engine, limits)
    assert [(card.name, card.state, card.pinned) for card in after.cards()] == [
        ("clinic", "resident", True),
        ("code", "resident", False),
    ]
    assert inside(folder) == [".lock", ".registry.json", ".verified.json", "clinic", "code"]


async def test_what_was_damaged_meanwhile_is_failed(
    store: AdapterStore, engine: Engine, limits: AdapterLimits, folder: Path
) -> None:
    before = await registry_of(store, engine, limits)
    await before.put("clinic", CLINIC, replace=False)
    cut_short(folder)
    await before.put("code", CODE, replace=False)
    store.close()
    with closing(AdapterStore(folder)) as reopened:
        after = await registry_of(reopened, engine, limits)
    assert [card.state for card in after.cards()] == ["failed", "resident"]


def test_a_store_has_one_server(folder: Path, store: AdapterStore) -> None:
    with pytest.raises(StartupError, match="another server"):
        AdapterStore(folder)


async def test_a_store_that_cannot_be_read(
    folder: Path, store: AdapterStore, limits: AdapterLimits
) -> None:
    (folder / ".registry.json").write_text('[{"name": 1}]')
    with pytest.raises(StartupError, match="delete it"):
        await registry_of(store, Engine(), limits)


async def test_what_fails_at_a_start_is_not_forgotten(
    store: AdapterStore, engine: Engine, limits: AdapterLimits, folder: Path
) -> None:
    before = await registry_of(store, engine, limits)
    await before.put("clinic", CLINIC, replace=False)
    await before.put("code", CODE, replace=False)
    store.close()
    with closing(AdapterStore(folder)) as reopened:
        lower = dataclasses.replace(limits, max_rank=4)
        meanwhile = await registry_of(reopened, engine, lower)
        assert [card.state for card in meanwhile.cards()] == ["failed", "failed"]
        await meanwhile.remove("code")
    with closing(AdapterStore(folder)) as reopened:
        after = await registry_of(reopened, engine, limits)
        assert [(card.name, card.state) for card in after.cards()] == [("clinic", "resident")]


async def test_what_cannot_be_written_down_does_not_happen(
    registry: Registry, engine: Engine, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(registered: object) -> None:
        raise Unavailable("no room")

    await registry.put("clinic", CLINIC, replace=False)
    before = registry.card("clinic")
    with monkeypatch.context() as patch:
        patch.setattr(store, "save", full)
        for change in (
            registry.put("clinic", CLINIC_2, replace=True),
            registry.pin("clinic", pinned=True),
            registry.remove("clinic"),
        ):
            with pytest.raises(Unavailable):
                await change
        await registry.settle()
    after = registry.card("clinic")
    assert (after.digest, after.pinned, after.state) == (before.digest, False, "resident")
    assert len(engine.loaded) == 1
    await registry.remove("clinic")
    assert not engine.loaded


async def test_two_at_once_for_one_name(registry: Registry) -> None:
    first = asyncio.create_task(registry.put("clinic", CLINIC, replace=False))
    await asyncio.sleep(0)
    with pytest.raises(Conflict):
        await registry.put("clinic", CODE, replace=False)
    await first


async def test_before_there_is_an_engine(store: AdapterStore) -> None:
    registry = Registry(store, max_registered=1, max_resident=1)
    with pytest.raises(Unavailable):
        await registry.put("clinic", CLINIC, replace=False)
