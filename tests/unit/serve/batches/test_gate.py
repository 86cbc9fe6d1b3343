"""When lines run beside live calls, by a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from packhorse.serve.batches.gate import Gate, as_batch


class World:
    """A gate, its clock, live calls and lines."""

    def __init__(self, *, share: float = 0.1, limit: int = 64) -> None:
        self.now_s = 100.0
        self.live = 0
        self.calls = 0
        self.room = True
        self.tasks: list[asyncio.Task[None]] = []
        self.gate = Gate(
            lambda: self.live + self.calls,
            share=share,
            quiet_s=1.0,
            has_room=lambda: self.room,
            clock=lambda: self.now_s,
        )
        self.gate.limit = limit
        self.gate._most = 1000.0  # see test_lines_at_once_keep_a_step_short

    @property
    def running(self) -> list[asyncio.Task[None]]:
        return [task for task in self.tasks if not task.done()]

    async def line(self) -> None:
        """A line whose call goes in as any other."""
        as_batch()
        self.calls += 1
        self.gate.entered()
        try:
            await asyncio.sleep(3600)
        finally:
            self.calls -= 1

    def fill(self) -> int:
        """Start lines while the gate allows them; how many."""
        started = 0
        while self.gate.allows():
            task = asyncio.create_task(self.line())
            self.tasks.append(task)
            self.gate.start(task)
            started += 1
        return started

    def arrives(self) -> None:
        self.live += 1
        self.gate.entered()

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)


@asynccontextmanager
async def world(**options: float) -> AsyncIterator[World]:
    made = World(**options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.gate.stop()
        await made.settle()


async def test_lines_grow_in_number_while_all_is_quiet() -> None:
    async with world(limit=20) as now:
        assert now.fill() == 1  # a live call may have been there just before
        counts = []
        for _ in range(5):
            now.now_s += 0.5
            now.fill()
            counts.append(len(now.running))
        assert counts == [1, 1, 4, 16, 20]


async def test_a_live_call_ends_all_lines_but_one() -> None:
    async with world() as now:
        now.now_s += 10
        assert now.fill() == 64
        oldest = now.tasks[0]
        now.arrives()
        await now.settle()
        assert now.running == [oldest]
        assert now.gate.preempted == 63
        assert now.fill() == 0
        now.live = 0
        now.now_s += 0.5
        assert now.fill() == 0  # not quiet for long enough
        now.now_s += 10
        assert now.fill() == 63


async def test_beside_live_calls_a_line_has_its_share_of_the_time() -> None:
    async with world(share=0.1) as now:
        now.arrives()
        busy_s = 0.0
        for _ in range(1000):
            if not now.running:
                now.fill()
            busy_s += 0.1 * len(now.running)
            now.now_s += 0.1
            if now.running and int(now.now_s * 10) % 5 == 0:  # lines take up to half a second
                now.running[0].cancel()
            await now.settle()
        assert 0.07 * 100 <= busy_s <= 0.13 * 100


async def test_who_has_had_its_share_is_ended_too() -> None:
    async with world(share=0.1) as now:
        now.arrives()
        assert now.fill() == 1
        now.now_s += 2
        now.running[0].cancel()
        await now.settle()
        now.live = 0
        now.now_s += 3  # 2 s beside live calls cost 18
        assert now.fill() > 1
        now.arrives()
        await now.settle()
        assert now.running == []


async def test_calls_of_lines_are_not_live() -> None:
    async with world() as now:
        now.now_s += 10
        assert now.fill() == 64
        assert now.gate.live == 0  # none of them has called yet
        await now.settle()
        assert now.calls == 64
        assert now.gate.live == 0
        assert len(now.running) == 64


async def test_without_room_no_line_starts() -> None:
    async with world() as now:
        now.now_s += 10
        now.room = False
        assert now.fill() == 0


async def test_lines_at_once_keep_a_step_short() -> None:
    """Of an engine whose steps take 5 ms, and 5 more for each line; and of a slow one."""
    for base_s, expected in ((0.005, range(6, 11)), (0.2, range(30, 50)), (0.0, range(6, 12))):
        gate = Gate(lambda: 0, share=0.1, quiet_s=0.0, max_step_s=0.05)
        gate.limit = 64
        for _ in range(500):
            step_s = base_s + 0.005 * int(gate._most)
            gate.took(60 * step_s, 60)
        assert int(gate._most) in expected, (base_s, gate._most)
