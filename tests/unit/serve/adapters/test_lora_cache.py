"""Which adapters the engine holds, and a folder that is watched."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from packhorse.serve.adapters.folder_watch import FolderWatch
from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.adapters.store import AdapterStore
from packhorse.serve.errors import Invalid, Overloaded, Unavailable
from packhorse.serve.metrics import ModelMetrics
from tests.unit.serve.adapters.loader import ADAPTERS, CLINIC, CLINIC_2, CODE, Engine, registry_of
from tests.unit.serve.cache.making import settled


async def test_a_caller_that_leaves_stops_nothing(registry: Registry, engine: Engine) -> None:
    engine.gate.clear()
    putting = asyncio.create_task(registry.put("clinic", CLINIC, replace=False))
    while not engine.at_once:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert registry.card("clinic").state == "staged"
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    engine.gate.set()
    await registry.settle()
    assert registry.card("clinic").state == "resident"


async def test_the_least_recently_used_goes(
    store: AdapterStore, engine: Engine, limits: AdapterLimits
) -> None:
    registry = await registry_of(store, engine, limits, resident=2)
    await registry.put("clinic", CLINIC, replace=False)
    await registry.put("code", CODE, replace=False)
    lease = registry.lease("clinic")
    await lease.ready(10, 10)  # used now
    lease.release()
    await registry.put("ledger", ADAPTERS / "ledger", replace=False)
    assert {name.split("@")[0] for name in engine.names} == {"clinic", "ledger"}
    assert registry.card("code").state == "staged"
    lease = registry.lease("code")
    await lease.ready(10, 10)
    assert {name.split("@")[0] for name in engine.names} == {"code", "ledger"}


async def test_what_the_engine_has_is_counted_whatever_happens_to_it(
    store: AdapterStore, engine: Engine, limits: AdapterLimits, metrics: ModelMetrics
) -> None:
    def counted() -> float | None:
        return metrics.registry.get_sample_value("packhorse_adapters_resident")

    registry = await registry_of(store, engine, limits, resident=2, metrics=metrics)
    await registry.put("clinic", CLINIC, replace=False)
    await registry.put("code", CODE, replace=False)
    assert counted() == 2
    engine.refusing.add("ledger")  # for which another goes
    with pytest.raises(Invalid):
        await registry.put("ledger", ADAPTERS / "ledger", replace=False)
    assert counted() == len(engine.loaded) == 1
    engine.loaded.clear()  # the engine has died
    assert counted() == 0


async def test_what_is_used_or_pinned_stays(
    store: AdapterStore, engine: Engine, limits: AdapterLimits
) -> None:
    registry = await registry_of(store, engine, limits, resident=4)
    names = ("clinic", "code", "ledger", "code-qlora")
    for name in names:
        await registry.put(name, ADAPTERS / name, replace=False, pinned=name == "clinic")
    for pinning in (
        registry.pin("code", pinned=True),
        registry.put("code", CODE, replace=True, pinned=True),
    ):
        with pytest.raises(Invalid, match="pinned"):
            await pinning
    leases = [registry.lease(name) for name in ("code", "ledger")]
    for lease in leases:
        await lease.ready(10, 10)
    await registry.put("new", CLINIC_2, replace=False)
    assert {name.split("@")[0] for name in engine.names} == {"clinic", "code", "ledger", "new"}
    for lease in leases:
        lease.release()


async def test_who_waits_for_a_slot_keeps_no_adapter_loaded(
    store: AdapterStore, engine: Engine, limits: AdapterLimits
) -> None:
    registry = await registry_of(store, engine, limits, resident=2)
    for name in ("clinic", "code", "ledger"):
        await registry.put(name, ADAPTERS / name, replace=False)
    leases = {name: registry.lease(name) for name in ("clinic", "code", "ledger")}
    await leases["code"].ready(10, 10)
    await leases["ledger"].ready(10, 10)
    waiting = asyncio.create_task(leases["clinic"].ready(10, 10))
    await settled()
    assert not waiting.done()
    assert {name.split("@")[0] for name in engine.names} == {"code", "ledger"}
    leases["code"].release(20)
    await waiting
    assert {name.split("@")[0] for name in engine.names} == {"clinic", "ledger"}
    leases["clinic"].release()
    leases["ledger"].release()


async def test_all_that_the_engine_holds_is_in_use(
    store: AdapterStore,
    engine: Engine,
    limits: AdapterLimits,
    metrics: ModelMetrics,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that are refused for it are counted, and no others."""

    def counted() -> float:
        refused = {"reason": "adapters_in_use"}
        name = "packhorse_admission_refusals_total"
        return metrics.registry.get_sample_value(name, refused) or 0.0

    registry = await registry_of(store, engine, limits, resident=1, metrics=metrics)
    await registry.put("clinic", CLINIC, replace=False)
    await registry.put("code", CODE, replace=False)  # for which the first one goes
    monkeypatch.setattr(registry._lora_cache, "_may_evict", lambda _: False)
    before = counted()
    with pytest.raises(Overloaded, match="max_cpu_loras"):
        await registry.put("ledger", ADAPTERS / "ledger", replace=False)
    assert counted() == before
    lease = registry.lease("clinic")
    with pytest.raises(Overloaded, match="max_cpu_loras"):
        await lease.ready(10, 10)
    lease.release()
    assert counted() == before + 1


async def test_no_more_than_the_limit(
    store: AdapterStore, engine: Engine, limits: AdapterLimits
) -> None:
    registry = await registry_of(store, engine, limits, registered=1)
    await registry.put("clinic", CLINIC, replace=False)
    with pytest.raises(Overloaded, match="max_registered"):
        await registry.put("code", CODE, replace=False)


async def test_a_request_that_leaves_while_its_adapter_loads(
    store: AdapterStore, engine: Engine, limits: AdapterLimits
) -> None:
    registry = await registry_of(store, engine, limits, resident=1)
    await registry.put("clinic", CLINIC, replace=False)
    await registry.put("code", CODE, replace=False)
    engine.gate.clear()
    lease = registry.lease("clinic")
    loading = asyncio.create_task(lease.ready(10, 10))
    while not engine.at_once:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    lease.release()
    engine.gate.set()
    removing = registry.remove("clinic")
    await removing
    assert not engine.loaded


async def test_an_adapter_lost_with_an_engine_is_loaded_again(
    registry: Registry, engine: Engine
) -> None:
    await registry.put("clinic", CLINIC, replace=False)
    engine.loaded.clear()
    assert registry.card("clinic").state == "staged"
    lease = registry.lease("clinic")
    await lease.ready(10, 10)
    assert engine.loaded
    lease.release()
    engine.loaded.clear()
    engine.refusing.add("clinic")
    lease = registry.lease("clinic")
    with pytest.raises(Unavailable, match="log says why"):
        await lease.ready(10, 10)
    lease.release()


async def test_a_watched_folder(registry: Registry, engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    watch = FolderWatch(folder, registry)
    await registry.put("by-hand", CODE, replace=False)
    shutil.copytree(CLINIC, folder / "clinic")
    (folder / ".hidden").mkdir()
    (folder / "notes").mkdir()
    await watch.look()
    assert registry.names == ["by-hand"], "it may still be copied"
    await watch.look()
    assert registry.names == ["by-hand", "clinic"]
    first = registry.card("clinic").digest
    shutil.copytree(CLINIC_2, folder / "clinic", dirs_exist_ok=True)
    (folder / "bad").mkdir()
    (folder / "bad" / "adapter_config.json").write_text("{")
    await watch.look()
    await watch.look()
    assert registry.card("clinic").digest != first
    assert registry.card("bad").state == "failed"
    loads = engine.loads
    await watch.look()
    assert engine.loads == loads
    shutil.rmtree(folder / "clinic")
    await watch.look()
    await watch.look()
    assert registry.names == ["by-hand"]
    shutil.rmtree(folder)
    await watch.look()
    await watch.look()
    assert [card.name for card in registry.cards()] == ["by-hand", "bad"], "it is away"


async def test_examples_follow_the_source(registry: Registry, tmp_path: Path) -> None:
    source = tmp_path / "clinic"
    shutil.copytree(CLINIC, source)
    await registry.put("clinic", source, replace=False)
    lease = registry.lease("clinic")
    examples = lease.adapter.folder / "examples.jsonl"
    assert examples.read_bytes() == (CLINIC / "examples.jsonl").read_bytes()
    (source / "examples.jsonl").write_text(json.dumps({"prompt": "a new one"}))
    await registry.put("clinic", source, replace=True)
    assert "a new one" in examples.read_text()
    (source / "examples.jsonl").unlink()
    await registry.put("clinic", source, replace=True)
    assert not examples.exists()
