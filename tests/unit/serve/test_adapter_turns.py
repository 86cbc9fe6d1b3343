"""Fairness between adapters, in a simulated engine with virtual time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import statistics
from collections import defaultdict

import pytest
from packhorse.serve import metrics
from packhorse.serve.adapters.lora_queue import Turns
from packhorse.serve.errors import Overloaded
from prometheus_client import REGISTRY

QUANTUM = 400


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Line:
    """Requests that enter and say so."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.inside: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, *adapters: int, tokens: int = 100) -> None:
        async def enter(adapter: int) -> None:
            await self.turns.enter(adapter, tokens, f"a{adapter}")
            self.inside.append(adapter)

        self.tasks += [asyncio.create_task(enter(adapter)) for adapter in adapters]
        await settle()

    async def end(self, *adapters: int) -> None:
        for adapter in adapters:
            self.inside.remove(adapter)
            self.turns.leave(adapter)
        await settle()


async def test_adapters_with_a_slot_are_not_held() -> None:
    line = Line(Turns(2, QUANTUM))
    await line.ask(1, 2, *[1] * 20)
    assert len(line.inside) == 22
    assert metrics.held() == 0


async def test_only_those_without_a_slot_wait() -> None:
    line = Line(Turns(2, QUANTUM))
    await line.ask(1, 2, 3, 1, 3)
    assert sorted(line.inside) == [1, 1, 2]
    assert metrics.held() == 2
    await line.end(2)
    assert sorted(line.inside) == [1, 1, 3, 3]
    assert metrics.held() == 0


async def test_who_waits_for_what_is_told() -> None:
    line = Line(Turns(1, QUANTUM, max_waiting=2))
    await line.ask(1, 2, 2, 3)
    assert metrics.adapters_waiting() == {"a2": 2, "a3": 1}
    with pytest.raises(Overloaded):
        await line.turns.enter(2, 1, "a2")
    line.tasks[1].cancel()
    await settle()
    assert metrics.adapters_waiting() == {"a2": 1, "a3": 1}
    await line.end(1)
    assert metrics.adapters_waiting() == {"a3": 1}
    await line.end(2)
    assert metrics.adapters_waiting() == {}


async def test_a_busy_adapter_yields_after_its_quantum() -> None:
    line = Line(Turns(1, QUANTUM))
    await line.ask(1, 2, *[1] * 10)
    assert line.inside == [1] * 4, "400 tokens, the first one's included"
    await line.end(1, 1, 1, 1)
    assert line.inside == [2]
    await line.end(2)
    assert line.inside == [1] * 7, "nobody else waits"


async def test_what_was_overdrawn_is_taken_off_the_next_turn() -> None:
    line = Line(Turns(1, QUANTUM))
    await line.ask(9)
    await line.ask(1, tokens=700)
    await line.ask(2, *[1] * 9, *[2] * 9)
    await line.end(9)
    assert line.inside == [1]
    await line.end(1)
    assert line.inside == [2] * 4
    await line.end(*[2] * 4)
    assert line.inside == [1], "400 less the 300 of before"


async def test_at_most_so_many_of_one_adapter() -> None:
    line = Line(Turns(2, QUANTUM, max_running=2))
    await line.ask(1, 1, 1, 2)
    assert sorted(line.inside) == [1, 1, 2]
    await line.end(1)
    assert sorted(line.inside) == [1, 1, 2]
    assert metrics.held() == 0


async def test_who_leaves_while_waiting_holds_up_nobody() -> None:
    line = Line(Turns(1, QUANTUM))
    await line.ask(1, 2, 3)
    line.tasks[1].cancel()
    await settle()
    assert metrics.held() == 1
    await line.end(1)
    assert line.inside == [3]
    await line.end(3)
    await line.ask(2)
    assert line.inside == [2]


async def test_who_leaves_as_somebody_ends() -> None:
    """All in one tick: the place of the one who leaves is still in line."""
    line = Line(Turns(1, QUANTUM))
    await line.ask(1, 2, 3)
    line.tasks[1].cancel()
    line.inside.remove(1)
    line.turns.leave(1)
    await settle()
    assert line.inside == [3]
    assert metrics.held() == 0
    await line.end(3)
    await line.ask(2)
    assert line.inside == [2]


async def test_no_more_than_so_many_wait() -> None:
    line = Line(Turns(1, QUANTUM, max_waiting=2))
    await line.ask(1, 2, 2)
    refused = {"reason": "adapter_waiting"}
    before = REGISTRY.get_sample_value("packhorse_admission_refusals_total", refused)
    with pytest.raises(Overloaded, match="max_waiting"):
        await line.turns.enter(2, 1, "a2")
    after = REGISTRY.get_sample_value("packhorse_admission_refusals_total", refused)
    assert after == before + 1
    assert metrics.held() == 2
    await line.end(1)
    assert line.inside == [2, 2]


async def test_who_leaves_in_the_moment_of_its_turn() -> None:
    turns = Turns(1, QUANTUM)
    await turns.enter(1, 1, "a1")
    second = asyncio.create_task(turns.enter(2, 1, "a2"))
    await settle()
    turns.leave(1)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    await asyncio.wait_for(turns.enter(3, 1, "a3"), 1)
    assert metrics.held() == 0


async def test_extra_slots_are_for_when_there_is_little_to_do() -> None:
    line = Line(Turns(1, QUANTUM, extra=1, few_requests=3))
    await line.ask(1, 2, 3)
    assert sorted(line.inside) == [1, 2]
    await line.end(2)
    assert sorted(line.inside) == [1, 3]
    await line.ask(1, 1)  # now there is much to do, and an adapter too many inside
    assert sorted(line.inside) == [1, 1, 1, 3]
    await line.ask(2)
    await line.end(3)
    assert sorted(line.inside) == [1, 1, 1], "2 would be one more than a slot"
    await line.end(1)
    assert sorted(line.inside) == [1, 1, 2], "little to do again"
    await line.end(1, 1, 2)
    assert (line.turns._requests, line.turns._given, line.turns._lines) == (0, 0, {})


async def test_adapters_come_down_to_the_slots_when_there_is_much_to_do() -> None:
    """Though nobody waits without a slot: each has its quantum, and then the last one waits."""
    line = Line(Turns(1, QUANTUM, extra=1, few_requests=2))
    await line.ask(1, 2)
    await line.ask(*[1] * 9, *[2] * 9)
    assert {adapter: line.inside.count(adapter) for adapter in (1, 2)} == {1: 4, 2: 4}
    await line.end(1, 1, 1, 1)
    assert set(line.inside) == {2}
    await line.end(2, 2, 2, 2)
    assert len(set(line.inside)) == 1


async def test_who_gives_up_is_not_counted() -> None:
    turns = Turns(1, QUANTUM, extra=1, few_requests=2, max_waiting=1)
    await turns.enter(1, 1, "a1")
    waiting = [asyncio.create_task(turns.enter(adapter, 1, "a")) for adapter in (2, 3, 3)]
    await settle()
    waiting[1].cancel()
    await settle()
    assert isinstance(waiting[2].exception(), Overloaded)
    assert turns._requests == 2


async def simulate(
    arrivals: list[tuple[float, int]], *, slots: int, seats: int, length_s: float = 1.0
) -> dict[int, list[float]]:
    """Seconds that each adapter's requests wait before an engine with so many seats begins them."""
    turns = Turns(slots, QUANTUM)
    waits: dict[int, list[float]] = defaultdict(list)
    events: list[tuple[float, int, str, int]] = []
    numbers = itertools.count()
    for at_s, adapter in arrivals:
        heapq.heappush(events, (at_s, next(numbers), "arrive", adapter))
    queue: list[tuple[int, float]] = []  # let in, without a seat yet
    free = seats
    tasks = []
    while events:
        now_s, _, kind, adapter = heapq.heappop(events)
        if kind == "arrive":

            async def enter(adapter: int, since_s: float) -> None:
                await turns.enter(adapter, 100, f"a{adapter}")
                queue.append((adapter, since_s))

            tasks.append(asyncio.create_task(enter(adapter, now_s)))
        else:
            free += 1
            turns.leave(adapter)
        await settle()
        while queue and free:
            adapter, since_s = queue.pop(0)
            free -= 1
            waits[adapter].append(now_s - since_s)
            heapq.heappush(events, (now_s + length_s, next(numbers), "end", adapter))
    assert all(task.done() for task in tasks)
    return waits


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def poisson(
    rate_per_s: float, length_s: float, adapters: list[int], seed: int
) -> list[tuple[float, int]]:
    rng = random.Random(seed)
    found, at_s = [], 0.0
    while (at_s := at_s + rng.expovariate(rate_per_s)) < length_s:
        found.append((at_s, rng.choice(adapters)))
    return found


async def test_forty_adapters_through_four_slots() -> None:
    adapters = list(range(40))
    waits = await simulate(poisson(3.2, 600, adapters, 1), slots=4, seats=16)
    each = [p95(waits[adapter]) for adapter in adapters]
    assert max(each) <= 2 * statistics.median(each) + 1


async def test_a_hot_adapter_does_not_starve_the_others() -> None:
    others = list(range(1, 40))
    calm = poisson(2.0, 600, others, 2)
    hot = poisson(8.0, 600, [0], 3)
    alone = await simulate(calm, slots=4, seats=16)
    beside = await simulate(sorted(calm + hot), slots=4, seats=16)
    each = [(p95(beside[adapter]), p95(alone[adapter])) for adapter in others]
    assert statistics.median(b for b, _ in each) <= 2 * statistics.median(a for _, a in each) + 1
