"""Finds the request that kills engines: requests that were in a dead engine go to the next engine
one at a time.

One at a time costs time when no request is poison, as when the machine ran out of memory; it is the
price of never refusing an innocent request. It lasts ISOLATION_S at most. New requests wait for
their turn too meanwhile, or one of them could be taken for the suspect that runs.

Suspicion outlasts the request (see `Quarantine`). A stream that has begun is not replayed, nor a
request whose client has left: the client sends it again, as a new request. When that comes after
the isolation has ended, it runs alone too, for LATE_ISOLATION_S at most.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable

from packhorse.serve.engines.quarantine import Quarantine

MARGIN_S = 0.5  # a suspect is cleared when it lives longer than before by this
ISOLATION_S = 30.0  # for all suspects together; requests that wait then go at once
SHORTEST_S = 1.0  # the least share of one suspect
LATE_ISOLATION_S = 5.0  # requests that come meanwhile wait so long
NONE = -1  # the number of the engine after the last


class PoisonDetector:
    """Says which request may go to the engine next. One engine at a time; told when it is lost and
    when there is another.
    """

    def __init__(self, quarantine: Quarantine, on_poison: Callable[[TrackedRequest], None]) -> None:
        """`on_poison` is called with a request that an engine has died of for certain."""
        self.quarantine = quarantine
        self._on_poison = on_poison
        self._judges = True
        self._engine: int | None = None  # its number, while there is one
        self._waiting: list[tuple[bool, float, int, asyncio.Future[None], TrackedRequest]] = []
        self._numbers = itertools.count()
        self._alone: TrackedRequest | None = None
        self._ends_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_isolating(self) -> bool:
        """Whether requests go one at a time."""
        return self._alone is not None or bool(self._waiting)

    def engine_lost(self, number: int) -> None:
        """No request's turn until there is another engine. A request that ran alone in the lost one
        is judged at once, not when it hears of the loss: its client may be slow to read, or gone,
        and the loss is counted before.
        """
        if self._engine == number:
            self._engine = None
        suspect = self._alone
        if suspect is None or not suspect.dies_with(number) or not self._judges:
            return
        if len(suspect.engines) > 1:
            suspect.is_culprit = True
            self.quarantine.add_poison(suspect.fingerprint)
            self._on_poison(suspect)

    def engine_is_new(self, number: int) -> None:
        """Suspects go to it, one at a time."""
        self._engine = number
        self._isolate_for(ISOLATION_S)

    def _isolate_for(self, length_s: float) -> None:
        self._ends_s = time.monotonic() + length_s
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(length_s, self._wake)
        self._wake()

    def engine_lives(self, number: int) -> None:
        """The engine was taken for lost too early: the turns go on."""
        if self._engine is None:
            self.engine_is_new(number)

    def stop_judging(self) -> None:
        """From now on engines end because the server ends them."""
        self._judges = False

    def no_engine_will_be(self) -> None:
        """All requests may go, to hear of it."""
        self._engine, self._ends_s = NONE, 0.0
        self._wake()

    @property
    def _is_over(self) -> bool:
        return time.monotonic() >= self._ends_s

    def share_s(self) -> float:
        """How long the request whose turn it is may run alone while others wait."""
        left_s = self._ends_s - time.monotonic()
        return max(left_s / (len(self._waiting) + 1), SHORTEST_S)

    async def wait_for_turn(self, suspect: TrackedRequest) -> None:
        """Wait for the request's turn. The one that lived shortest in its last engine comes first:
        most poison acts at once.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (not suspect.engines, suspect.lived_s, next(self._numbers), future, suspect)
        is_late = suspect.engines and self._is_over and not self.is_isolating
        heapq.heappush(self._waiting, entry)
        if is_late and self._engine not in (None, NONE):
            self._isolate_for(LATE_ISOLATION_S)
        self._wake()
        try:
            await future
        except asyncio.CancelledError:
            future.cancel()  # `_wake` skips it
            self.done(suspect)
            raise

    def done(self, suspect: TrackedRequest) -> None:
        """The request has had its turn, or does not need it any more."""
        if self._alone is suspect:
            self._alone = None
            self._wake()

    def runs_alone(self, suspect: TrackedRequest) -> bool:
        return self._alone is suspect

    def _wake(self) -> None:
        """The next request's turn; all requests' when the isolation is over."""
        over = self._is_over
        while self._engine is not None and self._waiting and (over or self._alone is None):
            *_, future, suspect = heapq.heappop(self._waiting)
            if not future.done():
                future.set_result(None)
                if not over:
                    self._alone = suspect


class TrackedRequest:
    """One request on its way through engines. Call `enters` and, if the engine dies with it inside,
    `lost`; `wait_for_turn` before the next engine; `clear` when it was answered, `leave` in any
    case.
    """

    def __init__(
        self, detector: PoisonDetector, request_id: str, make_fingerprint: Callable[[], bytes]
    ) -> None:
        """It is a suspect from the start when an equal request was one."""
        self.request_id = request_id
        self.engines: frozenset[int] = frozenset()
        """Numbers of the engines that died with it inside."""
        self.lived_s = 0.0
        self.is_culprit = False
        self._detector = detector
        self._make_fingerprint = make_fingerprint
        self._fingerprint: bytes | None = None
        self._inside: int | None = None
        self._entered_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        if not detector.quarantine.is_empty:
            known = detector.quarantine.suspicion(self.fingerprint)
            if known is not None:
                self.engines, self.lived_s = known

    @property
    def fingerprint(self) -> bytes:
        if self._fingerprint is None:
            self._fingerprint = self._make_fingerprint()
        return self._fingerprint

    @property
    def is_poison(self) -> bool:
        """Whether it, or an equal request, was found to be poison before."""
        quarantine = self._detector.quarantine
        return not quarantine.is_empty and quarantine.is_poison(self.fingerprint)

    async def wait_for_turn(self) -> None:
        """Wait until it may go to the engine."""
        await self._detector.wait_for_turn(self)

    @property
    def runs_alone(self) -> bool:
        """Whether it is the only one in the engine that may be to blame for a death."""
        return self._detector.runs_alone(self)

    def enters(self, engine: int) -> None:
        """The engine of that number has it from now on."""
        self._inside = engine
        self._entered_s = time.monotonic()
        if self.runs_alone:
            whole_s, share_s = self.lived_s + MARGIN_S, self._detector.share_s()
            # A request whose time was cut short is not cleared; the others only wait no longer.
            then = self.clear if whole_s <= share_s else self.leave
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(min(whole_s, share_s), then)

    def dies_with(self, engine: int) -> bool:
        """Whether it is in that engine, which is lost."""
        if self._inside != engine:
            return False
        self._inside = None
        self.lived_s = time.monotonic() - self._entered_s
        self.engines |= {engine}
        return True

    def lost(self, engine: int) -> None:
        """The engine of that number died with it inside; `is_culprit` says whether of it."""
        self._detector.engine_lost(engine)
        self.dies_with(engine)
        if not self.is_culprit:
            self._detector.quarantine.add_suspect(self.fingerprint, self.engines, self.lived_s)
        self.leave()

    def clear(self) -> None:
        """It was answered, or has lived longer than before: no engine died of it."""
        if self.engines:
            self._detector.quarantine.clear(self.fingerprint)
        self.leave()

    def leave(self) -> None:
        """The next request's turn. Safe to call at any time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._detector.done(self)
