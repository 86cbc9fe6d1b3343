"""What the service and operators ask of the adapters; the registry is the real one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from packhorse.serve.messages import AdapterVersion

State = Literal["queued", "validating", "staged", "resident", "draining", "failed"]


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """An adapter as an operator sees it.

    `staged` is on disk and checked, `resident` is in the engine too, `draining` is an old version
    that `requests` still use. `reason` says why it, or the last try to replace it, has failed.
    """

    name: str
    state: State
    digest: str | None
    rank: int | None
    pinned: bool
    requests: int
    reason: str | None = None


class Lease(Protocol):
    """The right to a version until `release`."""

    @property
    def adapter(self) -> AdapterVersion: ...

    def again(self) -> Lease:
        """Another right to the same version; this one must not have been released."""
        ...

    async def ready(self, prompt_tokens: int, max_tokens: int) -> None:
        """Wait for the adapter's turn, and have it in the engine. Raises ServeError."""
        ...

    def release(self, used_tokens: int = 0) -> None:
        """Say what it has cost, prompt and answer. Safe to call twice."""
        ...


class Adapters(Protocol):
    def __contains__(self, name: object) -> bool:
        """Whether requests can ask for it; at no cost, for every request."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Those that requests can ask for."""
        ...

    def lease(self, name: str) -> Lease:
        """The version that is current, for one request. Raises UnknownModel."""
        ...

    def cards(self) -> list[AdapterCard]:
        """Every adapter, and every old version that is still used."""
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
        """Add an adapter, or replace it: new requests get the new version as soon as the engine has
        it, those in flight end on the old one, which also stays if this fails. `pinned` None keeps
        what it was. `mark` is what tells the source from what it may be later.

        Raises Invalid (also for a source outside of the allowed folders), Conflict (it exists, and
        `replace` is off), Overloaded, Unavailable.
        """
        ...

    def mark(self, name: str) -> str:
        """The served version's, also of before a restart; empty when it has none."""
        ...

    async def remove(self, name: str) -> None:
        """No new request gets it; those in flight end on it. Raises NotFound."""
        ...

    async def pin(self, name: str, *, pinned: bool) -> AdapterCard:
        """A pinned adapter stays in the engine. Raises NotFound, Invalid when too many are."""
        ...
