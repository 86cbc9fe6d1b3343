"""The registry of adapters: their names, the version that each name serves, and the leases on it.

A request takes a lease on the version that is current when it arrives, and keeps it to its end. A
replaced or removed version is deleted from the engine and from the disk when its last lease ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from packhorse.serve.adapters.allowed_roots import AllowedRoots
from packhorse.serve.adapters.base import AdapterCard, State
from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.lease import Lease, Version
from packhorse.serve.adapters.lora_cache import Loader, LoraCache
from packhorse.serve.adapters.lora_queue import LoraQueue
from packhorse.serve.adapters.store import AdapterStore, Registration, Staged, check_name
from packhorse.serve.errors import (
    Conflict,
    Invalid,
    NotFound,
    Overloaded,
    ServeError,
    Unavailable,
    UnknownModel,
)
from packhorse.serve.messages import AdapterVersion
from packhorse.serve.metrics import ModelMetrics

logger = logging.getLogger("packhorse.adapters")


@dataclass(slots=True)
class _Entry:
    name: str
    pinned: bool = False
    current: Version | None = None
    doing: State | None = None  # the state of a new version that is being added
    reason: str | None = None  # why the adapter, or its last replacement, has failed
    stored: Registration | None = None  # kept after a failure too, which may pass


class Registry:
    """Satisfies the Adapters protocol. Call `start` once the engine is built. Changes are made one
    after the other, each to its end: cancelling the caller does not stop one.
    """

    def __init__(
        self,
        store: AdapterStore,
        *,
        max_registered: int,
        max_resident: int,
        quantum_tokens: int = 4096,
        max_concurrent_per_adapter: int | None = None,
        taken: frozenset[str] = frozenset(),
        allowed_roots: Sequence[Path] = (),
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`max_resident` is the size of the LoRA cache; see LoraQueue for `quantum_tokens` and
        `max_concurrent_per_adapter`. `taken` are model names that no adapter may have. Adapters are
        added from `allowed_roots` only.
        """
        self._roots = AllowedRoots(allowed_roots)
        self._metrics = metrics or ModelMetrics()
        self._new_queue = partial(
            LoraQueue,
            quantum_tokens=quantum_tokens,
            max_concurrent_per_adapter=max_concurrent_per_adapter,
            metrics=self._metrics,
        )
        self._slots = 1
        self.lora_queue = self._new_queue(1)
        self._store = store
        self._taken = taken
        self._max_registered = max_registered
        self._entries: dict[str, _Entry] = {}
        self._versions: dict[tuple[str, str], Version] = {}  # by name and digest; retired ones too
        self._numbers = itertools.count(1)
        self._lora_cache = LoraCache(max_resident, self._may_evict, metrics=self._metrics)
        self._limits: AdapterLimits | None = None
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(
        self,
        loader: Loader,
        limits: AdapterLimits,
        *,
        slots: int,
        extra_slots: int = 0,
        extra_slots_max_requests: int = 0,
        max_waiting: int | None = None,
    ) -> None:
        """Serve the adapters that were registered before a restart. One that cannot be served is
        listed as failed. Pinned adapters are loaded into the engine now, the others by `warm` or at
        their first request. See LoraQueue for the slots and `max_waiting`.

        Raises StartupError.
        """
        self._limits = limits
        self._slots = slots + extra_slots
        self.lora_queue = self._new_queue(
            slots,
            max_waiting=max_waiting,
            extra_slots=extra_slots,
            extra_slots_max_requests=extra_slots_max_requests,
        )
        self._lora_cache.loader = loader
        registered = await asyncio.to_thread(self._store.load)
        judged = await asyncio.to_thread(self._store.check_registrations, registered, limits)
        for known, found in zip(registered, judged, strict=True):
            entry = self._entries[known.name] = _Entry(known.name, known.pinned, stored=known)
            try:
                self._check_pins(entry, known.pinned)
                if isinstance(found, ServeError):
                    raise found
                entry.current = self._version(known.name, found)
                if known.pinned:
                    await self.ensure_loaded(entry.current.adapter)
            except ServeError as error:
                self._failed(entry, error)
        self._count()
        if registered:
            await asyncio.to_thread(self._store.save_verified, registered)

    async def warm(self) -> None:
        """Load adapters until the LoRA cache is full, so that first requests need not wait for a
        load. Call it once the server is ready.
        """
        for entry in list(self._entries.values()):
            async with self._changing:
                version = entry.current
                if version is None or not self._is_current(version):
                    continue
                try:
                    if not await self._lora_cache.warm(version.adapter):
                        return
                except Unavailable:  # the engine was lost
                    return
                except ServeError as error:
                    self._failed(entry, error)

    def _failed(self, entry: _Entry, error: ServeError) -> None:
        entry.reason = error.message
        self._metrics.adapter_failures.inc()
        logger.error("adapter=%s failed: %s", entry.name, error.message)

    def _version(self, name: str, staged: Staged) -> Version:
        """The version of this content. One that still exists keeps its number: the engine would
        hold the same content twice under two numbers.
        """
        digest = staged.digest
        known = self._versions.get((name, digest))
        if known is None:
            adapter = AdapterVersion(name, digest, staged.folder, next(self._numbers), staged.rank)
            known = self._versions[name, digest] = Version(adapter)
            self._metrics.adapter_waiting.labels(name)  # exported as 0 from the start
        return known

    def __contains__(self, name: object) -> bool:
        entry = self._entries.get(name) if isinstance(name, str) else None
        return entry is not None and entry.current is not None

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self._entries.values() if entry.current is not None]

    def folders(self) -> dict[str, Path]:
        """The folders of the current versions, by adapter; without adapters that have none."""
        return {
            name: entry.current.adapter.folder
            for name, entry in self._entries.items()
            if entry.current is not None
        }

    def cards(self) -> list[AdapterCard]:
        found = [self._card(entry) for entry in self._entries.values()]
        current = {id(entry.current) for entry in self._entries.values()}
        for version in self._versions.values():
            if id(version) not in current:
                adapter = version.adapter
                found.append(
                    AdapterCard(
                        adapter.name, "draining", adapter.digest, adapter.rank, False,
                        version.leases,
                    )
                )  # fmt: skip
        return found

    def card(self, name: str) -> AdapterCard:
        """Raises NotFound."""
        return self._card(self._entry(name))

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise NotFound(f"There is no adapter {name[:80]!r} here.", param="name")
        return entry

    def _card(self, entry: _Entry) -> AdapterCard:
        version = entry.current
        state: State = entry.doing or "failed"
        if version is not None and entry.doing is None:
            state = "resident" if version.adapter in self._lora_cache else "staged"
        adapter = version.adapter if version else None
        return AdapterCard(
            entry.name,
            state,
            adapter.digest if adapter else None,
            adapter.rank if adapter else None,
            entry.pinned,
            version.leases if version else 0,
            entry.reason,
        )

    def lease(self, name: str) -> Lease:
        entry = self._entries.get(name)
        if entry is None or entry.current is None:
            why = f": it has failed ({entry.reason})" if entry and entry.reason else ""
            raise UnknownModel(f"There is no adapter {name[:80]!r} here{why}.", param="model")
        return Lease(entry.current, self, self._metrics)

    async def ensure_loaded(self, adapter: AdapterVersion) -> None:
        """Load the adapter into the engine, if it is not loaded. Raises ServeError."""
        await self._lora_cache.ensure_loaded(adapter)

    def _may_evict(self, adapter: AdapterVersion) -> bool:
        """Whether the adapter may be unloaded to make room for another."""
        version = self._versions.get((adapter.name, adapter.digest))
        entry = self._entries.get(adapter.name)
        pinned = entry is not None and entry.pinned and entry.current is version
        return version is None or not (version.in_engine or pinned)

    def released(self, version: Version) -> None:
        """A lease has ended. The version is deleted if it was replaced and has no other lease."""
        if not version.leases and not self._is_current(version):
            self._shielded(self._retire(version))

    def _is_current(self, version: Version) -> bool:
        entry = self._entries.get(version.adapter.name)
        return entry is not None and entry.current is version

    async def _retire(self, version: Version) -> None:
        async with self._changing:
            adapter = version.adapter
            if version.leases or self._is_current(version):
                return  # it is current, or leased, again
            if self._versions.pop((adapter.name, adapter.digest), None) is None:
                return
            try:
                await self._lora_cache.drop(adapter)
            except ServeError as error:
                logger.warning("adapter=%s was not unloaded: %s", adapter.name, error.message)
            await asyncio.to_thread(self._store.forget, adapter.name, adapter.digest)
            logger.info("adapter=%s digest=%s is gone", adapter.name, adapter.digest[:12])
            if not any(name == adapter.name for name, _ in self._versions):
                self._metrics.forget_adapter(adapter.name)  # it has no requests any more

    def mark(self, name: str) -> str:
        entry = self._entries.get(name)
        version = entry.current if entry else None
        return self._store.mark_of(name, version.adapter.digest) if version else ""

    async def put(
        self,
        name: str,
        source: Path,
        *,
        replace: bool,
        pinned: bool | None = None,
        mark: str = "",
    ) -> AdapterCard:
        check_name(name)
        if self._limits is None:
            raise Unavailable("The engine is still loading; try again soon.", retry_after_s=10)
        if name in self._taken:
            raise Invalid(
                f"{name!r} names something else here; give the adapter another name.", param="name"
            )
        known = self._entries.get(name)
        if known is not None and not replace and (known.current is not None or known.doing):
            raise Conflict(
                f"There is an adapter {name!r} already; send replace=true to put another in its "
                "place.",
                param="name",
            )
        if known is None and len(self._entries) >= self._max_registered:
            raise Overloaded(
                f"{len(self._entries)} adapters are registered, the limit (adapters.max_registered)"
                "; remove one first."
            )
        entry = self._entries.setdefault(name, _Entry(name))
        entry.doing = "queued"
        self._count()
        card: AdapterCard = await self._shielded(self._put(entry, source, pinned, mark))
        return card

    def _shielded(self, work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        """Run it to its end, also when whoever waits for it is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def _put(
        self, entry: _Entry, source: Path, pinned: bool | None, mark: str
    ) -> AdapterCard:
        async with self._changing:
            if self._entries.get(entry.name) is not entry:
                raise Conflict(f"The adapter {entry.name!r} was removed meanwhile.", param="name")
            pinned = entry.pinned if pinned is None else pinned
            try:
                self._check_pins(entry, pinned)
                await self._replace(entry, source, pinned, mark)
            except BaseException as error:
                if isinstance(error, ServeError):
                    self._failed(entry, error)
                else:
                    entry.reason = "the server failed on it; its log says more"
                raise
            finally:
                entry.doing = None
        return self._card(entry)

    def _check_pins(self, entry: _Entry, pinned: bool) -> None:
        """Raises Invalid when it would leave too little room for adapters that are not pinned."""
        others = sum(other.pinned for other in self._entries.values() if other is not entry)
        needed = self._slots + 1  # the active ones, and one that is being loaded
        if pinned and others + 1 + needed > self._lora_cache.size:
            raise Invalid(
                f"{others} adapters are pinned. The engine holds {self._lora_cache.size} "
                f"(engine.max_cpu_loras), of which {needed} are for those that are not; unpin "
                "another.",
                param="pinned",
            )

    async def _replace(self, entry: _Entry, path: Path, pinned: bool, mark: str) -> None:
        assert self._limits is not None
        entry.doing = "validating"
        source = await asyncio.to_thread(self._roots.source, path)
        stage = partial(self._store.stage, entry.name, source, self._limits, mark=mark)
        staged = await asyncio.to_thread(stage)
        entry.doing = "staged"
        new = self._version(entry.name, staged)
        old = entry.current
        try:
            await self.ensure_loaded(new.adapter)
            await self._save(entry, Registration(entry.name, staged.digest, staged.rank, pinned))
        except BaseException:
            if new is not old and not new.leases:
                self._shielded(self._retire(new))
            raise
        entry.current, entry.pinned, entry.reason = new, pinned, None
        logger.info("adapter=%s digest=%s is served", entry.name, staged.digest[:12])
        if old is not None and old is not new and not old.leases:
            self._shielded(self._retire(old))

    async def _save(self, entry: _Entry, line: Registration | None) -> None:
        """Write the change to the store before it is made; None removes the entry. Raises
        Unavailable; nothing is changed then.
        """
        lines = {other.name: other.stored for other in self._entries.values()}
        lines[entry.name] = line
        kept = [each for each in lines.values() if each is not None]
        await asyncio.to_thread(self._store.save, kept)
        entry.stored = line

    def _count(self) -> None:
        self._metrics.adapters.set(len(self._entries))

    async def remove(self, name: str) -> None:
        self._entry(name)
        await self._shielded(self._remove(name))

    async def _remove(self, name: str) -> None:
        async with self._changing:
            entry = self._entry(name)
            await self._save(entry, None)
            del self._entries[name]
            self._count()
        if entry.current is not None and not entry.current.leases:
            await self._retire(entry.current)

    async def pin(self, name: str, *, pinned: bool) -> AdapterCard:
        self._entry(name)
        async with self._changing:
            entry = self._entry(name)
            self._check_pins(entry, pinned)
            if pinned and entry.current is not None:
                await self.ensure_loaded(entry.current.adapter)
            if entry.stored is not None:
                await self._save(entry, msgspec.structs.replace(entry.stored, pinned=pinned))
            entry.pinned = pinned
        return self._card(entry)

    async def settle(self) -> None:
        """Wait until every change has ended, for a clean shutdown."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))
