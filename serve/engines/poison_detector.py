"""Which request kills engines: found by letting those that were there at a death go on one by one.

One by one costs time when nothing is poison, as when the machine ran out of memory; the price of
never losing a request that is innocent. It lasts TRIALS_S at most; new requests take turns too
meanwhile, or one of them could be taken for the suspect that runs.

Suspicion outlasts the request (see `poison.Memory`): a stream that has begun is not done again by
us, nor a request whose client has left, but by the client, as a new request. When that comes after
the trials it is let in by itself, too, for LATE_TRIAL_S at most.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable

from packhorse.serve.engines.quarantine import Memory

MARGIN_S = 0.5  # a suspect must live longer than before by this
TRIALS_S = 30.0  # for all of them; who waits then goes at once
SHORTEST_S = 1.0  # the share of one of many
LATE_TRIAL_S = 5.0  # who comes meanwhile waits so long
NONE = -1  # the number of the engine after the last


class Suspects:
    """Whose turn it is. One engine at a time; told when it is lost and when there is another."""

    def __init__(self, memory: Memory, on_guilty: Callable[[Suspect], None]) -> None:
        """`on_guilty` is told whom an engine has died of for certain."""
        self.memory = memory
        self._on_guilty = on_guilty
        self._accuse = True
        self._engine: int | None = None  # its number, while there is one
        self._waiting: list[tuple[bool, float, int, asyncio.Future[None], Suspect]] = []
        self._numbers = itertools.count()
        self._on_trial: Suspect | None = None
        self._ends_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def are_tried(self) -> bool:
        """Whether everybody takes turns."""
        return self._on_trial is not None or bool(self._waiting)

    def engine_lost(self, number: int) -> None:
        """Nobody's turn until there is another. Whoever was on trial in it is judged at once, not
        when it is told: its client may be slow to read, or gone, and the loss is counted before.
        """
        if self._engine == number:
            self._engine = None
        suspect = self._on_trial
        if suspect is None or not suspect.dies_with(number) or not self._accuse:
            return
        if len(suspect.engines) > 1:
            suspect.is_guilty = True
            self.memory.convict(suspect.fingerprint)
            self._on_guilty(suspect)

    def engine_is_new(self, number: int) -> None:
        """The turns begin."""
        self._engine = number
        self._try_for(TRIALS_S)

    def _try_for(self, length_s: float) -> None:
        self._ends_s = time.monotonic() + length_s
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(length_s, self._wake)
        self._wake()

    def engine_lives(self, number: int) -> None:
        """It was given up too early: the turns go on."""
        if self._engine is None:
            self.engine_is_new(number)

    def accuse_nobody(self) -> None:
        """From now on engines are ended by us."""
        self._accuse = False

    def no_engine_will_be(self) -> None:
        """Everybody may go, to be told so."""
        self._engine, self._ends_s = NONE, 0.0
        self._wake()

    @property
    def _is_over(self) -> bool:
        return time.monotonic() >= self._ends_s

    def share_s(self) -> float:
        """How long the one whose turn it is may take, for the others' sake."""
        left_s = self._ends_s - time.monotonic()
        return max(left_s / (len(self._waiting) + 1), SHORTEST_S)

    async def turn(self, suspect: Suspect) -> None:
        """Wait for it. Who has died soonest comes first: most poison acts at once."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (not suspect.engines, suspect.lived_s, next(self._numbers), future, suspect)
        is_late = suspect.engines and self._is_over and not self.are_tried
        heapq.heappush(self._waiting, entry)
        if is_late and self._engine not in (None, NONE):
            self._try_for(LATE_TRIAL_S)
        self._wake()
        try:
            await future
        except asyncio.CancelledError:
            future.cancel()  # skipped where it waits still
            self.done(suspect)
            raise

    def done(self, suspect: Suspect) -> None:
        """It has had its turn, or does not need it any more."""
        if self._on_trial is suspect:
            self._on_trial = None
            self._wake()

    def is_tried(self, suspect: Suspect) -> bool:
        return self._on_trial is suspect

    def _wake(self) -> None:
        """The next one's turn; everybody's when the time for trials is over."""
        over = self._is_over
        while self._engine is not None and self._waiting and (over or self._on_trial is None):
            *_, future, suspect = heapq.heappop(self._waiting)
            if not future.done():
                future.set_result(None)
                if not over:
                    self._on_trial = suspect


class Suspect:
    """One request on its way through engines. Call `enters` and, if the engine dies with it inside,
    `lost`; `turn` before the next; `clear` when it was answered, `leave` in any case.
    """

    def __init__(
        self, others: Suspects, request_id: str, make_fingerprint: Callable[[], bytes]
    ) -> None:
        """It is suspected from the start where one that equals it was."""
        self.request_id = request_id
        self.engines: frozenset[int] = frozenset()
        """That died with it inside."""
        self.lived_s = 0.0
        self.is_guilty = False
        self._others = others
        self._make_fingerprint = make_fingerprint
        self._fingerprint: bytes | None = None
        self._inside: int | None = None
        self._entered_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        if not others.memory.is_empty:
            known = others.memory.suspicion(self.fingerprint)
            if known is not None:
                self.engines, self.lived_s = known

    @property
    def fingerprint(self) -> bytes:
        if self._fingerprint is None:
            self._fingerprint = self._make_fingerprint()
        return self._fingerprint

    @property
    def is_poison(self) -> bool:
        """Whether it, or one that equals it, was found guilty before."""
        memory = self._others.memory
        return not memory.is_empty and memory.is_poison(self.fingerprint)

    async def turn(self) -> None:
        """Wait until it may go to the engine."""
        await self._others.turn(self)

    @property
    def is_tried(self) -> bool:
        """Whether it goes alone, so that it is to blame for what happens."""
        return self._others.is_tried(self)

    def enters(self, engine: int) -> None:
        """The engine of that number has it from now on."""
        self._inside = engine
        self._entered_s = time.monotonic()
        if self.is_tried:
            whole_s, share_s = self.lived_s + MARGIN_S, self._others.share_s()
            # One whose time was cut short has proved nothing, and is only not waited for.
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
        """The engine of that number died with it; `is_guilty` tells whether of it."""
        self._others.engine_lost(engine)
        self.dies_with(engine)
        if not self.is_guilty:
            self._others.memory.suspect(self.fingerprint, self.engines, self.lived_s)
        self.leave()

    def clear(self) -> None:
        """It was answered, or has lived longer than before: no engine died of it."""
        if self.engines:
            self._others.memory.clear(self.fingerprint)
        self.leave()

    def leave(self) -> None:
        """The next one's turn. Safe to call at any time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._others.done(self)
