"""The protocol of the adapters, for the pipeline and for operators; Registry implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from packhorse.serve.messages import AdapterVersion

State = Literal["queued", "validating", "staged", "resident", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """An adapter as operators see it.

    States: `staged` is checked and on disk, `resident` is also loaded in the engine, `draining` is
    a replaced version that requests still use. `requests` counts its leases. `reason` says why the
    adapter, or its last replacement, has failed.
    """

    name: str
    state: State
    digest: str | None
    rank: int | None
    pinned: bool
    requests: int
    reason: str | None = None


class Lease(Protocol):
    """A request's right to use a version, until `release`."""

    @property
    def adapter(self) -> AdapterVersion: ...

    def duplicate(self) -> Lease:
        """Another lease on the same version. This one must not have been released."""
        ...

    async def ready(self, prompt_tokens: int, max_tokens: int) -> None:
        """Wait in the LoRA queue, and have the adapter loaded. Raises ServeError."""
        ...

    def release(self, used_tokens: int = 0) -> None:
        """End the lease. `used_tokens` is the cost, prompt and answer. Safe to call twice."""
        ...


class Adapters(Protocol):
    def __contains__(self, name: object) -> bool:
        """Whether requests can name it. A dictionary look-up: called for every request."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The adapters that requests can name."""
        ...

    def lease(self, name: str) -> Lease:
        """A lease on the current version, for one request. Raises UnknownModel."""
        ...

    def cards(self) -> list[AdapterCard]:
        """Every adapter, and every replaced version that is still used."""
        ...

    def card(self, name: str) -> AdapterCard:
        """Raises NotFound."""
        ...

    async def put(
        self,
        name: str,
        source: Path,
        *,
        replace: bool,
        pinned: bool | None = None,
        mark: str = "",
    ) -> AdapterCard:
        """Add or replace an adapter. New requests get the new version once the engine has loaded
        it; those in flight end on the old one, which also stays if this fails. `pinned` None keeps
        the old value. `mark` is a digest of the source folder's state, see `mark()`.

        Raises Invalid (also for a source outside the allowed folders), Conflict (it exists, and
        `replace` is off), Overloaded, Unavailable.
        """
        ...

    def mark(self, name: str) -> str:
        """The mark that the served version was added with, also before a restart; empty without."""
        ...

    async def remove(self, name: str) -> None:
        """Remove an adapter; its requests in flight end on it. Raises NotFound."""
        ...

    async def pin(self, name: str, *, pinned: bool) -> AdapterCard:
        """Pin or unpin; a pinned adapter is never evicted from the engine. Raises NotFound, and
        Invalid when too many are pinned.
        """
        ...
