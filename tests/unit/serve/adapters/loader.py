"""An engine that only remembers which adapters it was told to load."""

from __future__ import annotations

import asyncio

from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.adapters.store import AdapterStore
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import AdapterVersion
from packhorse.serve.metrics import ModelMetrics
from tests.conftest import DEMO

ADAPTERS = DEMO / "adapters"
CLINIC, CLINIC_2, CODE = (ADAPTERS / name for name in ("clinic", "clinic-v2", "code"))


class Engine:
    """A Loader. `gate` holds loads back while it is not set; `refusing` names what it refuses."""

    def __init__(self) -> None:
        self.loaded: dict[int, AdapterVersion] = {}
        self.loads = 0
        self.at_once = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusing: set[str] = set()

    def has_adapter(self, adapter: AdapterVersion) -> bool:
        return adapter.int_id in self.loaded

    async def load_adapter(self, adapter: AdapterVersion) -> None:
        self.at_once += 1
        assert self.at_once == 1, "one load at a time"
        await self.gate.wait()
        self.at_once -= 1
        if adapter.name in self.refusing:
            raise Invalid(f"the engine does not like {adapter.name}")
        assert (adapter.folder / "adapter_model.safetensors").is_file()
        self.loaded[adapter.int_id] = adapter
        self.loads += 1

    async def unload_adapter(self, adapter: AdapterVersion) -> None:
        del self.loaded[adapter.int_id]

    @property
    def names(self) -> set[str]:
        return {adapter.engine_name for adapter in self.loaded.values()}


async def registry_of(
    store: AdapterStore,
    engine: Engine,
    limits: AdapterLimits,
    *,
    resident: int = 4,
    registered: int = 10,
    metrics: ModelMetrics | None = None,
) -> Registry:
    """Adapters may come from the demo, and from the folder that the store is in."""
    registry = Registry(
        store,
        max_registered=registered,
        max_resident=resident,
        taken=frozenset({"demo", "auto"}),
        allowed_roots=(DEMO, store.folder_of("a", "b").parent.parent.parent),
        metrics=metrics,
    )
    await registry.start(engine, limits, slots=2)
    await registry.warm()
    return registry
