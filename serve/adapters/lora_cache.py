"""Which adapters the engine holds: at most so many, the least recently used goes first.

One load at a time, because each stops the engine for its length; from the page cache, so that it is
short, and only of what is still the copy that was checked when it was added. vLLM evicts by itself
when it holds too many, in the middle of a step; here it never does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from packhorse.serve import metrics
from packhorse.serve.adapters.copies import check_copy
from packhorse.serve.errors import Overloaded, Unavailable
from packhorse.serve.messages import AdapterVersion


class Loader(Protocol):
    """What an engine does with adapters. Loading and unloading raise ServeError."""

    def has_adapter(self, adapter: AdapterVersion) -> bool: ...

    async def load_adapter(self, adapter: AdapterVersion) -> None: ...

    async def unload_adapter(self, adapter: AdapterVersion) -> None: ...


class Residency:
    """Set `loader` before the first use."""

    def __init__(self, size: int, may_go: Callable[[AdapterVersion], bool]) -> None:
        """Room for `size`; only what `may_go` is unloaded to make room."""
        self.size = size
        self.loader: Loader | None = None
        self._may_go = may_go
        self._held: dict[int, AdapterVersion] = {}  # least recently used first
        self._loading = asyncio.Lock()
        metrics.ADAPTERS_RESIDENT.set_function(self._resident)

    def __contains__(self, adapter: AdapterVersion) -> bool:
        return adapter.int_id in self._held and self._loader().has_adapter(adapter)

    async def have(self, adapter: AdapterVersion) -> None:
        """Load it if it is not there. Raises ServeError: Invalid when its copy has changed,
        Overloaded when all others are in use.

        A load goes on when who wants it leaves: the engine would have it, and nobody would know.
        """
        if not self._touch(adapter):
            loading = asyncio.create_task(self._load(adapter))
            loading.add_done_callback(_look_at)
            await asyncio.shield(loading)

    async def warm(self, adapter: AdapterVersion) -> bool:
        """Load it while there is room that nobody has to make; False: there is none left. Raises
        ServeError.
        """
        if len(self._held) < self.size:
            await self._load(adapter, evicts=False)
        return len(self._held) < self.size

    async def _load(self, adapter: AdapterVersion, *, evicts: bool = True) -> None:
        async with self._loading:
            if self._touch(adapter):  # while we waited
                return
            loader = self._loader()
            while len(self._held) >= self.size:
                if not evicts:
                    return
                await self._make_room(loader)
            started_s = time.monotonic()
            await asyncio.to_thread(check_copy, adapter.folder, adapter.digest)
            await loader.load_adapter(adapter)
            self._held[adapter.int_id] = adapter
            metrics.ADAPTER_LOAD_SECONDS.observe(time.monotonic() - started_s)

    def _resident(self) -> int:
        """How many the engine has now: one that died has none."""
        loader = self.loader
        held = list(self._held.values())  # asked from a scrape's thread
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

    async def _make_room(self, loader: Loader) -> None:
        for held in self._held.values():
            if self._may_go(held):
                break
        else:
            raise Overloaded(
                f"All {self.size} adapters that the engine holds (engine.max_cpu_loras) are in use "
                "or pinned; try again."
            )
        # First, so that no request finds it here while it goes.
        del self._held[held.int_id]
        metrics.ADAPTER_EVICTIONS.inc()
        await loader.unload_adapter(held)

    async def drop(self, adapter: AdapterVersion) -> None:
        """Unload it, if it is there. Raises ServeError."""
        async with self._loading:
            if self._held.pop(adapter.int_id, None) is not None:
                await self._loader().unload_adapter(adapter)


def _look_at(loading: asyncio.Task[None]) -> None:
    if not loading.cancelled():
        loading.exception()  # told to who waits, if anybody does
