"""A registry over a store of its own, with an engine that only remembers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from packhorse.serve import metrics
from packhorse.serve.adapters.base_layers import linear_layers
from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.adapters.store import Store

from tests.conftest import DEMO
from tests.unit.serve.adapters.loader import Engine, registry_of


@pytest.fixture(scope="module")
def limits() -> AdapterLimits:
    return AdapterLimits(max_rank=16, layers=linear_layers(DEMO / "model"), max_bytes=2**24)


@pytest.fixture(autouse=True)
def _no_series() -> None:
    """Of registries before this test's, which nobody has emptied."""
    metrics.ADAPTER_WAITING.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    found = Store(folder)
    yield found
    found.close()


@pytest.fixture
async def engine() -> Engine:
    return Engine()


@pytest.fixture
async def registry(store: Store, engine: Engine, limits: AdapterLimits) -> Registry:
    return await registry_of(store, engine, limits)
