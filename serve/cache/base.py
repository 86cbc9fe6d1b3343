"""What requests and operators ask of the result cache, and what it asks of a store."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from packhorse.serve.cache.key import Key
from packhorse.serve.messages import CacheStatus, Chunk, Prompt
from packhorse.serve.request_context import RequestContext


class Render(Protocol):
    """Renders a request's prompt. `for_engine`: it is to be generated, so a request that has no
    place in the engine is refused first; otherwise its answer may be kept already.
    """

    def __call__(self, *, for_engine: bool) -> Awaitable[Prompt]: ...


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


class Work(Protocol):
    """One request's work in the engine, not begun."""

    @property
    def request_id(self) -> str:
        """For the log."""
        ...

    async def ready(self) -> None:
        """Wait for its turn. Raises ServeError."""
        ...

    def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Raises ServeError."""
        ...

    def begun(self) -> None:
        """The engine has read the prompt, or the first chunk is there. Safe to call twice."""
        ...

    def ended(self, completion_tokens: int, outcome: str) -> None:
        """It is over, begun or not; `outcome` is ok, or the kind of error. Safe to call twice."""
        ...


# Makes the work again, of this prompt, when an equal request's has failed. Raises Overloaded.
WorkAgain = Callable[[Prompt], Work]


class Lookup(Protocol):
    """Where one request's answer comes from: a kept result, an equal request that is being
    answered, or the engine. `close` it in every case.
    """

    status: CacheStatus

    @property
    def prompt(self) -> Prompt: ...

    @property
    def needs_engine(self) -> bool:
        """Whether `generate` must be called."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether equal requests may share this one's work, which may outlast it then."""
        ...

    def generate(self, work: Work) -> None:
        """Answer with this work; equal requests may share it from now on."""
        ...

    async def open(self, again: WorkAgain) -> tuple[Chunk, AsyncGenerator[Chunk, None]]:
        """The first chunk, and what gives the others.

        Where an equal request fails before it has given anything, its followers look again, so
        often as its error allows. Raises ServeError.
        """
        ...

    def close(self, completion_tokens: int, outcome: str) -> None:
        """Nothing more is read. Safe to call twice, and before `open`."""
        ...


class Lookups(Protocol):
    """What requests ask of the result cache."""

    async def look_up(self, context: RequestContext, render: Render) -> Lookup:
        """Find the answer to a request. `render` is called for requests that the engine must have,
        or whose prompt is not remembered. Raises what `render` raises.
        """
        ...


class Results(Lookups, Protocol):
    """What operators ask of it besides."""

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


class DirectLookup:
    """Of a request whose result is neither looked up nor kept. Satisfies the Lookup protocol."""

    status: CacheStatus = "bypass"
    is_shared = False

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self._work: Work | None = None

    @property
    def needs_engine(self) -> bool:
        return self._work is None

    def generate(self, work: Work) -> None:
        self._work = work

    async def open(self, again: WorkAgain) -> tuple[Chunk, AsyncGenerator[Chunk, None]]:
        assert self._work is not None
        return await begin(self._work)

    def close(self, completion_tokens: int, outcome: str) -> None:
        if self._work is not None:
            self._work.ended(completion_tokens, outcome)


async def begin(work: Work) -> tuple[Chunk, AsyncGenerator[Chunk, None]]:
    """Wait for the first chunk. Raises ServeError; nothing is left open then."""
    await work.ready()
    chunks = work.chunks()
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    work.begun()
    return first, chunks


class NoResults:
    """Where there is no result cache. Satisfies the Lookups protocol."""

    async def look_up(self, context: RequestContext, render: Render) -> Lookup:
        return DirectLookup(await render(for_engine=True))
