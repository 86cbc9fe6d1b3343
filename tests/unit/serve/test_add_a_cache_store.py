"""The store of docs/add-a-cache-store.md does what the page says."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve import cache as cache_room
from packhorse.serve.cache import STORES
from packhorse.serve.cache.base import Store, StoreError
from tests.conftest import ROOT
from tests.unit.serve.cache.caching_pipeline import answer, make
from tests.unit.serve.cache.making import ask, key

PAGE = (ROOT / "docs/add-a-cache-store.md").read_text(encoding="utf-8")
OLD, NEW = "0" * 16, "1" + "0" * 15


@pytest.fixture
def scheme(monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's class, in the table of stores."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/add-a-cache-store.md", "exec"), names)
    monkeypatch.setitem(STORES, "folder", names["FolderStore"])
    return "folder"


def store_in(folder: Path, scheme: str, timeout_s: float = 20.0) -> Store:
    return STORES[scheme](f"{scheme}://{folder}", "test", timeout_s)


async def test_values_come_back_until_they_expire(tmp_path: Path, scheme: str) -> None:
    store = store_in(tmp_path, scheme)
    assert await store.get(key(1)) is None
    await store.put(key(1), b"\x00\r\nbytes\xff", 60)
    await store.put(key(2), b"brief", -1)
    assert await store.get(key(1)) == b"\x00\r\nbytes\xff"
    assert await store.get(key(2)) is None
    assert await store_in(tmp_path, scheme).get(key(1)) == b"\x00\r\nbytes\xff"


async def test_the_higher_epoch_wins_whoever_writes_at_once(tmp_path: Path, scheme: str) -> None:
    stores = [store_in(tmp_path, scheme) for _ in range(4)]
    merged = [store.merge_epochs({f"model:{n}": NEW}) for n, store in enumerate(stores)]
    await asyncio.gather(*merged)
    found = await stores[0].merge_epochs({"model:0": OLD})
    assert found == {f"model:{n}": NEW for n in range(4)}


async def test_failures_are_store_errors(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = store_in(tmp_path / "away", scheme)
    with pytest.raises(StoreError) as caught:
        await away.put(key(1), b"x", 60)
    assert caught.value.reason == "error"
    (tmp_path / "test:epochs").write_text('{"all": "not an epoch"}')
    with pytest.raises(StoreError):
        await store_in(tmp_path, scheme).merge_epochs({})
    slow = store_in(tmp_path, scheme, timeout_s=0.01)
    monkeypatch.setattr(slow, "_read", lambda _: time.sleep(0.1))
    with pytest.raises(StoreError) as caught:
        await slow.get(key(1))
    assert caught.value.reason == "timeout"
    with pytest.raises(ValueError, match="PATH"):
        STORES[scheme]("folder://host", "test", 1.0)


async def test_two_replicas_share_results_and_flushes(tmp_path: Path, scheme: str) -> None:
    replicas = [make(store=store_in(tmp_path, scheme), memory_bytes=0) for _ in range(2)]
    caches: list[Any] = [pipeline.models.first.cache for pipeline, _ in replicas]
    for cache in caches:
        await cache.start()
    (one, engine), (other, other_engine) = replicas
    assert await answer(one, ask()) == ("miss", "one two three")
    await asyncio.gather(*caches[0]._puts)
    assert await answer(other, ask()) == ("hit", "one two three")
    assert (engine.generations, other_engine.generations) == (1, 0)
    await caches[0].flush("all")
    await caches[1].start()  # as its watch does, twice a second
    assert (await answer(other, ask()))[0] == "miss"
    for cache in caches:
        await cache.close()


def test_the_page_names_every_member_of_the_protocol() -> None:
    members = {name for name in vars(Store) if not name.startswith("_")}
    members |= set(Store.__annotations__)
    assert members == {"name", "get", "put", "merge_epochs", "count", "close"}
    table = PAGE.partition("The rules:")[0]
    assert all(re.search(rf"`{name}\b", table) for name in members)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:serve|tests)/[\w/.]+\.py)`", PAGE))))
def test_the_files_that_the_page_names_exist(path: str) -> None:
    assert (ROOT / path).exists() or path == "serve/cache/folder.py"


def test_the_settings_name_the_schemes_of_the_table() -> None:
    assert cache_room.STORES is STORES
    text = (ROOT / "serve/settings/cache.py").read_text(encoding="utf-8")
    assert "def _is_a_store" in text
    assert all(f'"{scheme}://"' in text for scheme in STORES)
