"""A request's hold on a version of an adapter, from its arrival to its end."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packhorse.serve import metrics
from packhorse.serve.errors import Invalid, Overloaded, Unavailable
from packhorse.serve.messages import AdapterVersion

if TYPE_CHECKING:
    from packhorse.serve.adapters.registry import Registry

logger = logging.getLogger("packhorse.adapters")

USUAL_ANSWER_TOKENS = 256  # counted until it is known; most requests leave their limit unused


@dataclass(slots=True)
class Version:
    """A version and who uses it."""

    adapter: AdapterVersion
    leases: int = 0
    inside: int = 0  # requests that have their turn


class Lease:
    """Satisfies the Lease protocol."""

    def __init__(self, version: Version, registry: Registry) -> None:
        self.adapter = version.adapter
        self._version = version
        self._registry = registry
        self._released = False
        self._charged_tokens: int | None = None
        version.leases += 1

    def again(self) -> Lease:
        return Lease(self._version, self._registry)

    async def ready(self, prompt_tokens: int, max_tokens: int) -> None:
        tokens = prompt_tokens + min(max_tokens, USUAL_ANSWER_TOKENS)
        await self._registry.turns.enter(self.adapter.int_id, tokens, self.adapter.name)
        self._charged_tokens = tokens
        self._version.inside += 1
        try:
            await self._registry.have_resident(self.adapter)
        except Overloaded:
            metrics.ADMISSION_REFUSALS.labels("adapters_in_use").inc()
            raise
        except Invalid as error:  # not the request's fault
            logger.error("adapter=%s cannot be loaded: %s", self.adapter.name, error.message)
            raise Unavailable(
                f"The adapter {self.adapter.name!r} cannot be loaded now; the server's log says "
                "why.",
                retry_after_s=30,
            ) from error

    def release(self, used_tokens: int = 0) -> None:
        if self._released:
            return
        self._released = True
        if self._charged_tokens is not None:
            self._version.inside -= 1
            more_tokens = used_tokens - self._charged_tokens
            self._registry.turns.leave(self.adapter.int_id, more_tokens)
        self._version.leases -= 1
        self._registry.released(self._version)
