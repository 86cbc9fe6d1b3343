"""The circuit breaker around the shared store: closed, requests use the store; open, they do not.

There is no half-open state: the result cache polls the store for flushes anyway, and closes the
breaker when the store answers.
"""

from __future__ import annotations

import logging

from packhorse.serve.metrics import ModelMetrics

logger = logging.getLogger("packhorse.cache")

# Consecutive failures that open the breaker. A time-out costs a request its whole wait, a refused
# connection nothing, so fewer time-outs suffice.
MAX_TIMEOUTS, MAX_REFUSALS = 2, 5


class CircuitBreaker:
    """Opens after a few consecutive failures, and is open until the store has answered once."""

    def __init__(self, name: str, *, metrics: ModelMetrics | None = None) -> None:
        """`name` is the store's address for the log."""
        self._name = name
        self._metrics = metrics or ModelMetrics()
        self._timeouts = self._refusals = 0
        self.is_open = True
        self._metrics.cache_store_up.set(0)

    def failed(self, reason: str) -> None:
        """A call to the store has failed; `reason` is StoreError's."""
        self._metrics.cache_store_failures.labels(reason).inc()
        if reason == "timeout":
            self._timeouts += 1
        else:
            self._refusals += 1
        if not self.is_open and (self._timeouts >= MAX_TIMEOUTS or self._refusals >= MAX_REFUSALS):
            self.open(reason)

    def open(self, reason: str) -> None:
        """Do without the store; `reason` is for the log."""
        if not self.is_open:
            logger.warning("The result cache does without %s: %s", self._name, reason)
        self.is_open = True
        self._metrics.cache_store_up.set(0)

    def worked(self) -> None:
        """A call of a request has succeeded: earlier failures do not count any more."""
        self._timeouts = self._refusals = 0

    def close(self) -> None:
        """The store answers: requests use it."""
        if self.is_open:
            logger.info("The result cache uses %s", self._name)
        self.is_open = False
        self.worked()
        self._metrics.cache_store_up.set(1)
