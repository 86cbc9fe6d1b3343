"""A registry over a store of its own, with an engine that only remembers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from packhorse.serve.adapters.base_layers import linear_layers
from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.adapters.store import AdapterStore
from packhorse.serve.metrics import ModelMetrics
from tests.conftest import DEMO
from tests.unit.serve.adapters.loader import Engine, registry_of


@pytest.fixture(scope="module")
def limits() -> AdapterLimits:
    return AdapterLimits(max_rank=16, layers=linear_layers(DEMO / "model"), max_bytes=2**24)


@pytest.fixture
def metrics() -> ModelMetrics:
    """Those of the registry."""
    return ModelMetrics()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[AdapterStore]:
    found = AdapterStore(folder)
    yield found
    found.close()


@pytest.fixture
async def engine() -> Engine:
    return Engine()


@pytest.fixture
async def registry(
    store: AdapterStore, engine: Engine, limits: AdapterLimits, metrics: ModelMetrics
) -> Registry:
    return await registry_of(store, engine, limits, metrics=metrics)
