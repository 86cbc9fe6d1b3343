"""Whether an engine that was lost is built again, and after which pause.

Deaths of poison are no sign of an engine that cannot live. So they count together as one failure
until somebody was answered since, and then as none. Not as none at once: with a device that is
broken every request looks like poison, and such a server must end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection

from packhorse.serve.settings.sections import SupervisorSettings

MAX_BACKOFF_S = 60.0


class Restarts:
    """Counts failures within restart_window_s."""

    def __init__(
        self, settings: SupervisorSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._clock = settings, clock
        self._failures: deque[tuple[float, int | None]] = deque()
        self._convictions: deque[float] = deque()  # since somebody was answered
        self._pardoned: set[int] = set()

    def failed(self, engine: int | None) -> None:
        """The engine of that number was lost; None: one could not be built."""
        if engine is None or engine not in self._pardoned:
            self._failures.append((self._clock(), engine))

    def pardon(self, engines: Collection[int]) -> None:
        """Poison was found, and these died of it, the last of them just now."""
        self._pardoned = set(engines)  # no other's loss is still to be told
        self._failures = deque(entry for entry in self._failures if entry[1] not in engines)
        self._convictions.append(self._clock())

    def answered(self) -> None:
        """An engine lives: called for each answer, so it must cost nothing."""
        if self._convictions:
            self._convictions.clear()

    @property
    def count(self) -> int:
        since_s = self._clock() - self._settings.restart_window_s
        while self._failures and self._failures[0][0] < since_s:
            self._failures.popleft()
        while self._convictions and self._convictions[0] < since_s:
            self._convictions.popleft()
        return len(self._failures) + len(self._convictions)

    @property
    def are_over(self) -> bool:
        """Whether there were too many."""
        return self.count > self._settings.max_restarts

    @property
    def pause_s(self) -> float:
        """Before the next engine is built."""
        earlier = self.count - 1
        if earlier < 1:
            return 0.0
        return float(min(self._settings.backoff_s * 2 ** (earlier - 1), MAX_BACKOFF_S))
