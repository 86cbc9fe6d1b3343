"""Whether an engine that was lost is built again, and after which pause.

Deaths caused by poison requests do not mean that an engine cannot live. So they count together as
one failure until a request was answered since, and then as none. Not as none at once: with a device
that is broken every request looks like poison, and such a server must end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection

from packhorse.serve.settings.supervisor import SupervisorSettings

MAX_BACKOFF_S = 60.0


class RestartPolicy:
    """Counts failures within restart_window_s."""

    def __init__(
        self, settings: SupervisorSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._clock = settings, clock
        self._failures: deque[tuple[float, int | None]] = deque()
        self._poison_deaths: deque[float] = deque()  # since a request was answered
        self._forgiven: set[int] = set()

    def failed(self, engine: int | None) -> None:
        """The engine of that number was lost; None: an engine could not be built."""
        if engine is None or engine not in self._forgiven:
            self._failures.append((self._clock(), engine))

    def forgive(self, engines: Collection[int]) -> None:
        """These engines died of a poison request, the last of them just now."""
        self._forgiven = set(engines)  # no other engine's loss is still to be counted
        self._failures = deque(entry for entry in self._failures if entry[1] not in engines)
        self._poison_deaths.append(self._clock())

    def answered(self) -> None:
        """A request was answered. Called for each, so it must cost nothing."""
        if self._poison_deaths:
            self._poison_deaths.clear()

    @property
    def count(self) -> int:
        since_s = self._clock() - self._settings.restart_window_s
        while self._failures and self._failures[0][0] < since_s:
            self._failures.popleft()
        while self._poison_deaths and self._poison_deaths[0] < since_s:
            self._poison_deaths.popleft()
        return len(self._failures) + len(self._poison_deaths)

    @property
    def are_over(self) -> bool:
        """Whether there were too many failures."""
        return self.count > self._settings.max_restarts

    @property
    def pause_s(self) -> float:
        """How long to wait before the next engine is built."""
        earlier = self.count - 1
        if earlier < 1:
            return 0.0
        return float(min(self._settings.backoff_s * 2 ** (earlier - 1), MAX_BACKOFF_S))
