"""What the Responses API asks of the store of responses, and what it keeps there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec


class ResponseStore(Protocol):
    """Keeps bytes by tenant and id, within limits of its own and for a time of its own."""

    def fits(self, size: int) -> bool:
        """Whether content of so many bytes is kept."""
        ...

    def put(self, tenant: str, response_id: str, content: bytes) -> None:
        """Keep it in the place of what was there; where replicas share a store, it is written there
        soon after.
        """
        ...

    async def get(self, tenant: str, response_id: str) -> bytes | None:
        """Raises Unavailable when a shared store cannot be asked."""
        ...

    async def delete(self, tenant: str, response_id: str) -> None:
        """Raises Unavailable when a shared store cannot be told."""
        ...

    async def close(self) -> None:
        """Finish what is being written. A shared store's connections are not its own."""
        ...


@dataclass(frozen=True, slots=True)
class Kept:
    """A response as it is kept."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    """All that the model was told, the items of earlier responses among it."""
    ends_by_s: float | None = None
    """Unix time at which one in the background is over, whatever became of its server."""

    def encoded(self) -> bytes:
        kept = {"response": self.response, "items": self.items, "ends_by_s": self.ends_by_s}
        # A model may write half a character, which no prompt can have: a question mark then.
        return json.dumps(kept, ensure_ascii=False).encode(errors="replace")

    @classmethod
    def decoded(cls, content: bytes) -> Kept:
        found = msgspec.json.decode(content)  # megabytes, in the event loop: five times as fast
        return cls(found["response"], found["items"], found["ends_by_s"])
