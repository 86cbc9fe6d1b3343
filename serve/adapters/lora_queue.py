"""Who may enter the engine when more adapters are wanted than one batch can have.

vLLM takes waiting requests in their order and passes over those whose adapter finds no slot, so a
busy adapter keeps its slot for ever and the rest starve. Here at most as many adapters as there are
slots have requests in the engine. An adapter that others wait for may let in no more than a quantum
of tokens; then its slot, once its last request has ended, is the next one's: deficit round robin
(Shreedhar and Varghese, 1995) over adapters, where what one turn overdraws is taken off the next.

Where the engine can have more adapters at work than in a batch, there are `extra` slots, but only
while there is little to do: adapters that stand still in the engine take up room in it, and would
leave a full engine half idle.
"""

from __future__ import annotations

import asyncio
from collections import deque

from packhorse.serve import metrics
from packhorse.serve.errors import Overloaded


class Turns:
    """Call `enter` before the engine and `leave` after it, with the same adapter."""

    def __init__(
        self,
        slots: int,
        quantum_tokens: int,
        *,
        max_running: int | None = None,
        max_waiting: int | None = None,
        extra: int = 0,
        few_requests: int = 0,
    ) -> None:
        """`max_running` is the most requests of one adapter in the engine, `max_waiting` the most
        that are held back: more would keep other adapters' requests from being admitted. The
        `extra` slots are given while there are no more than `few_requests`, waiting ones included.
        """
        self._slots = slots
        self._extra = extra
        self._few_requests = few_requests
        self._given = 0
        self._requests = 0  # that have entered or want to
        self._quantum = quantum_tokens
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._lines: dict[int, _Line] = {}  # of adapters with anything to do; those next come first

    async def enter(self, adapter: int, tokens: int, name: str) -> None:
        """Wait for the turn. `tokens` is what the request will cost, `name` the adapter's in
        metrics. Raises Overloaded when too many of the adapter wait already.
        """
        line = self._lines.get(adapter)
        if line is None:
            line = self._lines[adapter] = _Line()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (waiter, tokens)
        line.waiting.append(place)
        self._requests += 1
        self._go()
        if waiter.done():
            return
        if self._max_waiting is not None and len(line.waiting) > self._max_waiting:
            self._give_up(adapter, line, place)
            metrics.ADMISSION_REFUSALS.labels("adapter_waiting").inc()
            raise Overloaded(
                f"{self._max_waiting} requests wait for this adapter already, the limit "
                "(adapters.max_waiting); try again soon."
            )
        of_adapter = metrics.ADAPTER_WAITING.labels(name)
        of_adapter.inc()
        metrics.HELD.inc()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.leave(adapter, -tokens)  # it was its turn in this moment
            else:
                self._give_up(adapter, line, place)
            raise
        finally:
            metrics.HELD.dec()
            of_adapter.dec()

    def _give_up(self, adapter: int, line: _Line, place: _Place) -> None:
        """Who waited there does so no more."""
        self._requests -= 1
        if place in line.waiting:  # or `_go` has passed over it
            line.waiting.remove(place)
        if self._lines.get(adapter) is line:
            self._tidy(adapter, line)
        self._go()

    def leave(self, adapter: int, more_tokens: int = 0) -> None:
        """One request of it has ended. It has cost so much more than was said; below 0: less."""
        line = self._lines[adapter]
        self._requests -= 1
        line.running -= 1
        line.credit -= more_tokens
        self._tidy(adapter, line)
        self._go()

    def _free(self) -> int:
        """How many slots may be given; below 0: so many have to come back."""
        extra = self._extra if self._requests <= self._few_requests else 0
        return self._slots + extra - self._given

    def _tidy(self, adapter: int, line: _Line) -> None:
        """Take the slot of an adapter that is done, or has had its share while others wait."""
        if line.has_slot and not line.running and (not line.waiting or self._must_yield(line)):
            line.has_slot = False
            self._given -= 1
            self._lines[adapter] = self._lines.pop(adapter)  # to the end
        if not line.has_slot and not line.waiting and not line.running:
            del self._lines[adapter]

    def _others_wait(self) -> bool:
        """Whether an adapter without a slot wants one, or there are too many with one."""
        return self._free() < 0 or any(
            line.waiting and not line.has_slot for line in self._lines.values()
        )

    def _must_yield(self, line: _Line) -> bool:
        return line.credit <= 0 and self._others_wait()

    def _go(self) -> None:
        """Let in whoever may: first those next in line to the slots that are free."""
        for line in self._lines.values():
            if self._free() <= 0:
                break
            if line.waiting and not line.has_slot:
                line.has_slot = True
                self._given += 1
                line.credit = min(line.credit, 0) + self._quantum
        others_wait = self._others_wait()
        for line in self._lines.values():
            if not line.has_slot:
                continue
            while line.waiting and (line.credit > 0 or not others_wait or not line.running):
                if self._max_running is not None and line.running >= self._max_running:
                    break
                waiter, tokens = line.waiting.popleft()
                if waiter.done():  # cancelled, and its task has not run since
                    continue
                line.credit -= tokens
                line.running += 1
                waiter.set_result(None)
            if not others_wait:
                line.credit = max(line.credit, 0)  # what hurt nobody is not held against it


_Place = tuple["asyncio.Future[None]", int]


class _Line:
    """One adapter's."""

    __slots__ = ("credit", "has_slot", "running", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Place] = deque()
        self.running = 0
        self.credit = 0
        self.has_slot = False
