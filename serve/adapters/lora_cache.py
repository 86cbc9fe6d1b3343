"""The LRU cache of adapters that are loaded in the engine.

Adapters are loaded one at a time, because the engine stands still during a load. Each copy is read
and checked first, so that the engine loads it from the page cache. vLLM's own cache would evict in
the middle of a step; this one makes room before a load, so that vLLM's is never full.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from packhorse.serve.adapters.copies import check_copy
from packhorse.serve.errors import Overloaded, Unavailable
from packhorse.serve.messages import AdapterVersion
from packhorse.serve.metrics import ModelMetrics


class Loader(Protocol):
    """The engine, as far as adapters are loaded into it. Loading and unloading raise ServeError."""

    def has_adapter(self, adapter: AdapterVersion) -> bool: ...

    async def load_adapter(self, adapter: AdapterVersion) -> None: ...

    async def unload_adapter(self, adapter: AdapterVersion) -> None: ...


class LoraCache:
    """Set `loader` before the first use."""

    def __init__(
        self,
        size: int,
        may_evict: Callable[[AdapterVersion], bool],
        *,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """Room for `size` adapters; one is evicted only if `may_evict` allows it."""
        self.size = size
        self.loader: Loader | None = None
        self._may_evict = may_evict
        self._metrics = metrics or ModelMetrics()
        self._held: dict[int, AdapterVersion] = {}  # least recently used first
        self._loading = asyncio.Lock()
        self._metrics.adapters_resident.set_function(self._resident)

    def __contains__(self, adapter: AdapterVersion) -> bool:
        return adapter.int_id in self._held and self._loader().has_adapter(adapter)

    async def ensure_loaded(self, adapter: AdapterVersion) -> None:
        """Load the adapter if it is not loaded. Raises ServeError: Invalid when its copy has
        changed, Overloaded when all loaded adapters are in use.

        A load goes on when the caller is cancelled: else the engine could hold an adapter that this
        cache does not know of.
        """
        if not self._touch(adapter):
            loading = asyncio.create_task(self._load(adapter))
            loading.add_done_callback(_retrieve_exception)
            await asyncio.shield(loading)

    async def warm(self, adapter: AdapterVersion) -> bool:
        """Load the adapter if that evicts no other; False when no free room is left. Raises
        ServeError.
        """
        if len(self._held) < self.size:
            await self._load(adapter, evicts=False)
        return len(self._held) < self.size

    async def _load(self, adapter: AdapterVersion, *, evicts: bool = True) -> None:
        async with self._loading:
            if self._touch(adapter):  # loaded while this call waited for the lock
                return
            loader = self._loader()
            while len(self._held) >= self.size:
                if not evicts:
                    return
                await self._evict(loader)
            started_s = time.monotonic()
            await asyncio.to_thread(check_copy, adapter.folder, adapter.digest)
            await loader.load_adapter(adapter)
            self._held[adapter.int_id] = adapter
            self._metrics.adapter_load_seconds.observe(time.monotonic() - started_s)

    def _resident(self) -> int:
        """How many adapters the engine holds now: one that died holds none."""
        loader = self.loader
        held = list(self._held.values())  # a copy: scrapes run in a thread
        return sum(loader is not None and loader.has_adapter(adapter) for adapter in held)

    def _touch(self, adapter: AdapterVersion) -> bool:
        held = self._held.pop(adapter.int_id, None)
        if held is None or not self._loader().has_adapter(adapter):  # lost with an engine
            return False
        self._held[adapter.int_id] = held
        return True

    def _loader(self) -> Loader:
        if self.loader is None:
            raise Unavailable("The engine is still loading; try again soon.", retry_after_s=10)
        return self.loader

    async def _evict(self, loader: Loader) -> None:
        for held in self._held.values():
            if self._may_evict(held):
                break
        else:
            raise Overloaded(
                f"All {self.size} adapters that the engine holds (engine.max_cpu_loras) are in use "
                "or pinned; try again."
            )
        # Before the unload, so that no request takes it for loaded meanwhile.
        del self._held[held.int_id]
        self._metrics.adapter_evictions.inc()
        await loader.unload_adapter(held)

    async def drop(self, adapter: AdapterVersion) -> None:
        """Unload the adapter, if it is loaded. Raises ServeError."""
        async with self._loading:
            if self._held.pop(adapter.int_id, None) is not None:
                await self._loader().unload_adapter(adapter)


def _retrieve_exception(loading: asyncio.Task[None]) -> None:
    """The waiting request gets the error; without one, asyncio would log it as never retrieved."""
    if not loading.cancelled():
        loading.exception()
