"""What the service and operators ask of the result cache, and what it asks of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from packhorse.serve.cache.codec import Result
from packhorse.serve.cache.key import Key
from packhorse.serve.cache.render_cache import Known
from packhorse.serve.cache.single_flight import Flight
from packhorse.serve.messages import GenerateRequest, Prompt, Route


@dataclass(frozen=True, slots=True)
class Amount:
    """What the tiers hold. The store's entries are an estimate; None where it cannot count."""

    memory_entries: int
    memory_bytes: int
    store_entries: int | None = None


class StoreError(Exception):
    """A store did not do what it was asked. `reason` is timeout, refused, or error."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Store(Protocol):
    """A server that replicas share. Every call ends within the time given at its making, and raises
    StoreError.
    """

    name: str
    """For logs: its address, without secrets."""

    async def get(self, key: Key) -> bytes | None: ...

    async def put(self, key: Key, value: bytes, ttl_s: float) -> None: ...

    async def merge_epochs(self, seen: Mapping[str, str]) -> dict[str, str]:
        """Raise each of the store's epochs to the one given, where that is higher; returns all that
        it has then. In one step, whatever other replicas do.
        """
        ...

    async def count(self, scope: str) -> int | None:
        """Roughly how many results of a scope it has; None when it cannot tell."""
        ...

    async def close(self) -> None: ...


class Results(Protocol):
    """The result cache."""

    def concerns(self, request: GenerateRequest) -> bool:
        """Whether its result may be looked up or kept, as far as can be told before rendering."""
        ...

    def known(self, request: GenerateRequest) -> Known | None:
        """An equal request's prompt, without what the engine wants. Raises Unkeyable."""
        ...

    def learn(self, request: GenerateRequest, prompt: Prompt) -> Known:
        """Remember the request's prompt. Raises Unkeyable."""
        ...

    def key(self, request: GenerateRequest, route: Route, known: Known) -> Key | None:
        """What its result is kept under; None when it is neither looked up nor kept."""
        ...

    def flight(self, key: Key) -> Flight | None:
        """The generation of an equal request that is on its way."""
        ...

    def lead(self, key: Key) -> Flight:
        """A flight for others to join, if there is none for this key yet."""
        ...

    def recall(self, key: Key, request: GenerateRequest) -> Result | None:
        """From memory, at once. None while flushes on other replicas cannot be heard of."""
        ...

    @property
    def has_store(self) -> bool:
        """Whether `fetch` could find more."""
        ...

    async def fetch(self, key: Key, request: GenerateRequest) -> Result | None:
        """From the store. Never raises: what cannot be had is not there."""
        ...

    def tenant_scope(self, tenant: str) -> str:
        """What a flush of the tenant's results is about."""
        ...

    async def flush(self, scope: str) -> Amount:
        """Make results void, on every replica; returns how much that was. Raises Unavailable when
        the store cannot be told.
        """
        ...

    async def amount(self, scope: str) -> Amount:
        """How much a flush would make void."""
        ...
