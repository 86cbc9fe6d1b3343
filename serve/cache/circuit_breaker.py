"""When to leave a store alone. Requests never try it again: whoever looks at it now and then
anyway says that it is back.
"""

from __future__ import annotations

import logging

from packhorse.serve import metrics

logger = logging.getLogger("packhorse.cache")

# A time-out costs a request its whole wait, a refusal nothing: so the first few are too many
# much earlier.
MAX_TIMEOUTS, MAX_REFUSALS = 2, 5


class Breaker:
    """Closed: the store is asked. Opens after a few failures in a row."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._timeouts = self._refusals = 0
        self.is_open = True  # until it has answered once
        metrics.CACHE_STORE_UP.set(0)

    def failed(self, reason: str) -> None:
        metrics.CACHE_STORE_FAILURES.labels(reason).inc()
        if reason == "timeout":
            self._timeouts += 1
        else:
            self._refusals += 1
        if not self.is_open and (self._timeouts >= MAX_TIMEOUTS or self._refusals >= MAX_REFUSALS):
            self.open(reason)

    def open(self, reason: str) -> None:
        if not self.is_open:
            logger.warning("The result cache does without %s: %s", self._name, reason)
        self.is_open = True
        metrics.CACHE_STORE_UP.set(0)

    def worked(self) -> None:
        """A request was served by it: what failed before was not the beginning of more."""
        self._timeouts = self._refusals = 0

    def close(self) -> None:
        """It answers."""
        if self.is_open:
            logger.info("The result cache uses %s", self._name)
        self.is_open = False
        self.worked()
        metrics.CACHE_STORE_UP.set(1)
