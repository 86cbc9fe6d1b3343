"""When lines of batches may run: whenever there are no live calls, and hardly ever beside them.

A live call that arrives ends the lines in the engine at once; they run again later, and nothing of
them was kept. Only one may stay, so that a batch goes on under steady traffic: it costs live calls
little, and only in a small share of the time. A live call has to wait for the engine's step in
progress, so lines at once are only as many as keep a step short; and when all has been quiet for a
while, they start in growing numbers.

`docs/decisions/0013-batches-beside-live-traffic.md` has the reasons and the figures.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

# Whether the running task makes calls for a batch.
_is_batch: ContextVar[bool] = ContextVar("is_batch", default=False)
RAMP_S = 0.25
"""Lines at once double in this time, once all is quiet."""
FEWER, MORE = 0.95, 0.25
"""Lines at once are multiplied by the one when a step was too long, and grow by the other when not.
"""


class Gate:
    """Knows the lines that run, and hears of every call that arrives. In the event loop only."""

    def __init__(
        self,
        calls: Callable[[], int],
        *,
        share: float,
        quiet_s: float,
        max_step_s: float = 0.05,
        has_room: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`calls` counts the calls in flight that use the engine, lines among them; `has_room` says
        whether lines leave the engine room for live calls.
        """
        self._calls = calls
        self._has_room = has_room
        self._share = share
        self._quiet_s = quiet_s
        self._clock = clock
        self.limit = 1
        """Lines at once, at the most."""
        self._max_step_s = max_step_s
        self._fastest_s = math.inf
        self._most = 4.0
        self._lines: dict[asyncio.Task[None], float] = {}
        self._entered: set[asyncio.Task[Any] | None] = set()
        """Lines whose call is counted among those in flight."""
        self._live_s = clock()
        """When a live call was seen last."""
        self._beside: asyncio.Task[None] | None = None
        self._beside_since_s = 0.0
        self._beside_from_s = 0.0
        self.preempted = 0

    @property
    def running(self) -> int:
        """Lines in flight."""
        return len(self._lines)

    @property
    def live(self) -> int:
        """Live calls in flight."""
        return max(0, self._calls() - len(self._entered))

    def allows(self) -> bool:
        """Whether one more line may start now."""
        now_s = self._clock()
        if not self._has_room() or len(self._lines) >= min(self.limit, int(self._most)):
            return False
        if self.live:
            self._live_s = now_s
            return not self._lines and now_s >= self._beside_from_s
        quiet_s = now_s - self._live_s - self._quiet_s
        if quiet_s < 0:
            return not self._lines and now_s >= self._beside_from_s
        return len(self._lines) < 2 ** min(quiet_s / RAMP_S, 30)

    def start(self, work: asyncio.Task[None]) -> None:
        """A line runs in this task, which has not begun."""
        now_s = self._clock()
        self._lines[work] = now_s
        if self.live or now_s - self._live_s < self._quiet_s:
            self._stay(work, now_s)
        work.add_done_callback(self._ended)

    def _stay(self, work: asyncio.Task[None], now_s: float) -> None:
        """This line may run beside live calls."""
        self._beside, self._beside_since_s = work, now_s

    def _ended(self, work: asyncio.Task[None]) -> None:
        now_s = self._clock()
        del self._lines[work]
        self._entered.discard(work)
        if work is self._beside:
            self._beside = None
            ran_s = now_s - self._beside_since_s
            self._beside_from_s = now_s + ran_s * (1 / self._share - 1)

    def entered(self) -> None:
        """A call has arrived, by the task that runs. If it is a live one, lines make room."""
        if _is_batch.get():
            self._entered.add(asyncio.current_task())
            return
        now_s = self._live_s = self._clock()
        if not self._lines:
            return
        if self._beside is None and now_s >= self._beside_from_s:
            self._stay(next(iter(self._lines)), now_s)  # the oldest has the least left
        for work in self._lines:
            if work is not self._beside and not work.cancelling():
                self.preempted += 1
                work.cancel()

    def took(self, seconds: float, tokens: int) -> None:
        """A line was answered in this time with so many tokens, at about one for each step."""
        step_s = seconds / max(1, tokens)
        self._fastest_s = min(self._fastest_s, step_s)
        if step_s > max(self._max_step_s, 2 * self._fastest_s):
            self._most = max(1.0, self._most * FEWER)
        else:
            self._most = min(self._most + MORE, float(max(self.limit, 1)))

    def stop(self) -> None:
        """End all lines."""
        for work in self._lines:
            work.cancel()


def as_batch() -> None:
    """From now on, the calls of this task are a batch's."""
    _is_batch.set(True)
