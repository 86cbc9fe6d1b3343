"""A request's lease on a version of an adapter, from its arrival to its end."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packhorse.serve.errors import Invalid, Overloaded, Unavailable
from packhorse.serve.messages import AdapterVersion

if TYPE_CHECKING:
    from packhorse.serve.adapters.registry import Registry
    from packhorse.serve.metrics import ModelMetrics

logger = logging.getLogger("packhorse.adapters")

# The expected length of an answer, as the cost that a request enters the queue with: most answers
# end well below their max_tokens.
USUAL_ANSWER_TOKENS = 256


@dataclass(slots=True)
class Version:
    """A version, and how many requests use it."""

    adapter: AdapterVersion
    leases: int = 0
    in_engine: int = 0
    """Requests that have passed the LoRA queue."""


class Lease:
    """Satisfies the Lease protocol."""

    def __init__(self, version: Version, registry: Registry, metrics: ModelMetrics) -> None:
        self.adapter = version.adapter
        self._version = version
        self._registry = registry
        self._metrics = metrics
        self._released = False
        self._charged_tokens: int | None = None
        version.leases += 1

    def duplicate(self) -> Lease:
        return Lease(self._version, self._registry, self._metrics)

    async def ready(self, prompt_tokens: int, max_tokens: int) -> None:
        tokens = prompt_tokens + min(max_tokens, USUAL_ANSWER_TOKENS)
        await self._registry.lora_queue.enter(self.adapter.int_id, tokens, self.adapter.name)
        self._charged_tokens = tokens
        self._version.in_engine += 1
        try:
            await self._registry.ensure_loaded(self.adapter)
        except Overloaded:
            self._metrics.admission_refusals.labels("adapters_in_use").inc()
            raise
        except Invalid as error:  # the server's fault, not the request's
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
            self._version.in_engine -= 1
            more_tokens = used_tokens - self._charged_tokens
            self._registry.lora_queue.leave(self.adapter.int_id, more_tokens)
        self._version.leases -= 1
        self._registry.released(self._version)
