"""Fairness between adapters, in a simulated engine with virtual time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import statistics
from collections import defaultdict

import pytest

from packhorse.serve.adapters.lora_queue import LoraQueue
from packhorse.serve.errors import Overloaded
from packhorse.serve.metrics import ModelMetrics

QUANTUM = 400


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Requests:
    """Requests that enter a queue; `admitted` are the adapters of those in the engine."""

    def __init__(self, slots: int, **options: int) -> None:
        self.metrics = ModelMetrics()
        self.queue = LoraQueue(slots, QUANTUM, metrics=self.metrics, **options)
        self.admitted: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, *adapters: int, tokens: int = 100) -> None:
        async def enter(adapter: int) -> None:
            await self.queue.enter(adapter, tokens, f"a{adapter}")
            self.admitted.append(adapter)

        self.tasks += [asyncio.create_task(enter(adapter)) for adapter in adapters]
        await settle()

    async def end(self, *adapters: int) -> None:
        for adapter in adapters:
            self.admitted.remove(adapter)
            self.queue.leave(adapter)
        await settle()


async def test_requests_of_adapters_with_a_slot_do_not_wait() -> None:
    requests = Requests(2)
    await requests.ask(1, 2, *[1] * 20)
    assert len(requests.admitted) == 22
    assert requests.metrics.requests_waiting_for_engine() == 0


async def test_requests_of_adapters_without_a_slot_wait() -> None:
    requests = Requests(2)
    await requests.ask(1, 2, 3, 1, 3)
    assert sorted(requests.admitted) == [1, 1, 2]
    assert requests.metrics.requests_waiting_for_engine() == 2
    await requests.end(2)
    assert sorted(requests.admitted) == [1, 1, 3, 3]
    assert requests.metrics.requests_waiting_for_engine() == 0


async def test_waiting_requests_are_counted_by_adapter() -> None:
    requests = Requests(1, max_waiting=2)
    await requests.ask(1, 2, 2, 3)
    assert requests.metrics.adapters_waiting() == {"a2": 2, "a3": 1}
    with pytest.raises(Overloaded):
        await requests.queue.enter(2, 1, "a2")
    requests.tasks[1].cancel()
    await settle()
    assert requests.metrics.adapters_waiting() == {"a2": 1, "a3": 1}
    await requests.end(1)
    assert requests.metrics.adapters_waiting() == {"a3": 1}
    await requests.end(2)
    assert requests.metrics.adapters_waiting() == {}


async def test_a_busy_adapter_yields_after_its_quantum() -> None:
    requests = Requests(1)
    await requests.ask(1, 2, *[1] * 10)
    assert requests.admitted == [1] * 4, "400 tokens, the first one's included"
    await requests.end(1, 1, 1, 1)
    assert requests.admitted == [2]
    await requests.end(2)
    assert requests.admitted == [1] * 7, "nobody else waits"


async def test_an_overdrawn_quantum_is_deducted_from_the_next() -> None:
    requests = Requests(1)
    await requests.ask(9)
    await requests.ask(1, tokens=700)
    await requests.ask(2, *[1] * 9, *[2] * 9)
    await requests.end(9)
    assert requests.admitted == [1]
    await requests.end(1)
    assert requests.admitted == [2] * 4
    await requests.end(*[2] * 4)
    assert requests.admitted == [1], "400 less the 300 of before"


async def test_an_adapter_has_at_most_its_limit_of_concurrent_requests() -> None:
    requests = Requests(2, max_concurrent_per_adapter=2)
    await requests.ask(1, 1, 1, 2)
    assert sorted(requests.admitted) == [1, 1, 2]
    await requests.end(1)
    assert sorted(requests.admitted) == [1, 1, 2]
    assert requests.metrics.requests_waiting_for_engine() == 0


async def test_a_request_cancelled_while_waiting_delays_no_other() -> None:
    requests = Requests(1)
    await requests.ask(1, 2, 3)
    requests.tasks[1].cancel()
    await settle()
    assert requests.metrics.requests_waiting_for_engine() == 1
    await requests.end(1)
    assert requests.admitted == [3]
    await requests.end(3)
    await requests.ask(2)
    assert requests.admitted == [2]


async def test_a_request_cancelled_as_another_ends_delays_no_other() -> None:
    """All in one tick: the place of the one who leaves is still in requests."""
    requests = Requests(1)
    await requests.ask(1, 2, 3)
    requests.tasks[1].cancel()
    requests.admitted.remove(1)
    requests.queue.leave(1)
    await settle()
    assert requests.admitted == [3]
    assert requests.metrics.requests_waiting_for_engine() == 0
    await requests.end(3)
    await requests.ask(2)
    assert requests.admitted == [2]


async def test_at_most_max_waiting_requests_wait() -> None:
    requests = Requests(1, max_waiting=2)
    await requests.ask(1, 2, 2)
    with pytest.raises(Overloaded, match="max_waiting"):
        await requests.queue.enter(2, 1, "a2")
    refused = {"reason": "adapter_waiting"}
    name = "packhorse_admission_refusals_total"
    assert requests.metrics.registry.get_sample_value(name, refused) == 1
    assert requests.metrics.requests_waiting_for_engine() == 2
    await requests.end(1)
    assert requests.admitted == [2, 2]


async def test_a_request_cancelled_as_it_is_admitted_gives_its_slot_back() -> None:
    metrics = ModelMetrics()
    queue = LoraQueue(1, QUANTUM, metrics=metrics)
    await queue.enter(1, 1, "a1")
    second = asyncio.create_task(queue.enter(2, 1, "a2"))
    await settle()
    queue.leave(1)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    await asyncio.wait_for(queue.enter(3, 1, "a3"), 1)
    assert metrics.requests_waiting_for_engine() == 0


async def test_extra_slots_are_given_at_low_load() -> None:
    requests = Requests(1, extra_slots=1, extra_slots_max_requests=3)
    await requests.ask(1, 2, 3)
    assert sorted(requests.admitted) == [1, 2]
    await requests.end(2)
    assert sorted(requests.admitted) == [1, 3]
    await requests.ask(1, 1)  # high load now, and one active adapter too many
    assert sorted(requests.admitted) == [1, 1, 1, 3]
    await requests.ask(2)
    await requests.end(3)
    assert sorted(requests.admitted) == [1, 1, 1], "2 would be one more than a slot"
    await requests.end(1)
    assert sorted(requests.admitted) == [1, 1, 2], "low load again"
    await requests.end(1, 1, 2)
    queue = requests.queue
    assert (queue._requests, queue._slots_given, queue._queues) == (0, 0, {})


async def test_active_adapters_fall_to_the_slots_at_high_load() -> None:
    """Also when no adapter is without a slot: both use their quantum, then one has to wait."""
    requests = Requests(1, extra_slots=1, extra_slots_max_requests=2)
    await requests.ask(1, 2)
    await requests.ask(*[1] * 9, *[2] * 9)
    assert {adapter: requests.admitted.count(adapter) for adapter in (1, 2)} == {1: 4, 2: 4}
    await requests.end(1, 1, 1, 1)
    assert set(requests.admitted) == {2}
    await requests.end(2, 2, 2, 2)
    assert len(set(requests.admitted)) == 1


async def test_requests_that_give_up_are_not_counted() -> None:
    queue = LoraQueue(1, QUANTUM, extra_slots=1, extra_slots_max_requests=2, max_waiting=1)
    await queue.enter(1, 1, "a1")
    waiting = [asyncio.create_task(queue.enter(adapter, 1, "a")) for adapter in (2, 3, 3)]
    await settle()
    waiting[1].cancel()
    await settle()
    assert isinstance(waiting[2].exception(), Overloaded)
    assert queue._requests == 2


async def simulate(
    arrivals: list[tuple[float, int]], *, slots: int, seats: int, length_s: float = 1.0
) -> dict[int, list[float]]:
    """Seconds that each adapter's requests wait before an engine with so many seats begins them."""
    lora_queue = LoraQueue(slots, QUANTUM)
    waits: dict[int, list[float]] = defaultdict(list)
    events: list[tuple[float, int, str, int]] = []
    numbers = itertools.count()
    for at_s, adapter in arrivals:
        heapq.heappush(events, (at_s, next(numbers), "arrive", adapter))
    queue: list[tuple[int, float]] = []  # admitted, without a seat yet
    free = seats
    tasks = []
    while events:
        now_s, _, kind, adapter = heapq.heappop(events)
        if kind == "arrive":

            async def enter(adapter: int, since_s: float) -> None:
                await lora_queue.enter(adapter, 100, f"a{adapter}")
                queue.append((adapter, since_s))

            tasks.append(asyncio.create_task(enter(adapter, now_s)))
        else:
            free += 1
            lora_queue.leave(adapter)
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
