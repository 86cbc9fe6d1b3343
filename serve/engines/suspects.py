"""Which request kills engines: found by letting those that were there at a death go on one by one.

One by one costs time when nothing is poison, as when the machine ran out of memory; the price of
never losing a request that is innocent. It lasts TRIALS_S at most; new requests take turns too
meanwhile, or one of them could be taken for the suspect that runs.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time

MARGIN_S = 0.5  # a suspect must live longer than before by this
TRIALS_S = 30.0  # for all of them; who waits then goes at once
SHORTEST_S = 1.0  # the share of one of many


class Suspects:
    """Whose turn it is. One engine at a time; told when it is lost and when there is another."""

    def __init__(self) -> None:
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
        """Nobody's turn until there is another."""
        if self._engine == number:
            self._engine = None

    def engine_is_new(self, number: int) -> None:
        """The turns begin."""
        self._engine = number
        self._ends_s = time.monotonic() + TRIALS_S
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(TRIALS_S, self._wake)
        self._wake()

    def engine_lives(self, number: int) -> None:
        """It was given up too early: the turns go on."""
        if self._engine is None:
            self.engine_is_new(number)

    def no_engine_will_be(self) -> None:
        """Everybody may go, to be told so."""
        self._engine, self._ends_s = -1, 0.0
        self._wake()

    def share_s(self) -> float:
        """How long the one whose turn it is may take, for the others' sake."""
        left_s = self._ends_s - time.monotonic()
        return max(left_s / (len(self._waiting) + 1), SHORTEST_S)

    async def turn(self, suspect: Suspect) -> None:
        """Wait for it. Who has died soonest comes first: most poison acts at once."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (not suspect.deaths, suspect.lived_s, next(self._numbers), future, suspect)
        heapq.heappush(self._waiting, entry)
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
        over = time.monotonic() >= self._ends_s
        while self._engine is not None and self._waiting and (over or self._on_trial is None):
            *_, future, suspect = heapq.heappop(self._waiting)
            if not future.done():
                future.set_result(None)
                if not over:
                    self._on_trial = suspect


class Suspect:
    """One request on its way through engines. Call `enters` and, if the engine dies with it inside,
    `lost`; `turn` before the next; `acquit` at the end.
    """

    def __init__(self, others: Suspects) -> None:
        self.deaths = 0
        self.lived_s = 0.0
        self._others = others
        self._entered_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def turn(self) -> None:
        """Wait until it may go to the engine."""
        await self._others.turn(self)

    @property
    def is_tried(self) -> bool:
        """Whether it goes alone, so that it is to blame for what happens."""
        return self._others.is_tried(self)

    def enters(self) -> None:
        """The engine has it from now on."""
        self._entered_s = time.monotonic()
        if self.is_tried:
            trial_s = min(self.lived_s + MARGIN_S, self._others.share_s())
            self._timer = asyncio.get_running_loop().call_later(trial_s, self.acquit)

    def lost(self, engine: int) -> bool:
        """The engine of that number died with it. Whether this is the request that did it."""
        self._others.engine_lost(engine)
        self.lived_s = time.monotonic() - self._entered_s
        self.deaths += 1
        guilty = self.is_tried and self.deaths > 1
        self.acquit()
        return guilty

    def acquit(self) -> None:
        """It ended, or lived long enough: the next one's turn. Safe to call at any time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._others.done(self)
