from __future__ import annotations

import asyncio

import pytest

from packhorse.serve.errors import Overloaded
from packhorse.serve.limits import body_memory as module
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.messages import Caller

ONE, TWO, THREE = (
    Caller(name=name, tenant=name, scopes=frozenset({"inference"})) for name in ("a", "b", "c")
)


class Calls:
    """Tasks that reserve, and hold what they have until they are told to end."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.has = 0

    def reserve(self, caller: Caller, size: int, then: int | None = None) -> asyncio.Task[None]:
        async def run() -> None:
            await self._bodies.reserve(caller, size)
            self.has += 1
            if then is not None:
                self._bodies.shrink(then)
            await asyncio.Event().wait()

        return asyncio.create_task(run())


async def end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settled()


async def settled() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def test_one_key_has_half_and_others_the_rest() -> None:
    bodies = Bodies(100)
    calls = Calls(bodies)
    mine = [calls.reserve(ONE, 20) for _ in range(3)]
    await settled()
    assert (calls.has, bodies.held) == (2, 40)
    others = [calls.reserve(TWO, 50), calls.reserve(THREE, 10)]
    await settled()
    assert (calls.has, bodies.held) == (4, 100)
    await end(mine[0])
    assert (calls.has, bodies.held) == (5, 100), "whoever waited has what another gave back"
    await end(*mine, *others)
    assert bodies.held == 0


async def test_what_is_not_needed_lets_the_next_in() -> None:
    bodies = Bodies(100)
    calls = Calls(bodies)
    tasks = [calls.reserve(ONE, 30, then=1) for _ in range(20)]
    await settled()
    assert (calls.has, bodies.held) == (20, 20)
    await end(*tasks)
    assert bodies.held == 0


async def test_one_is_always_taken_however_large() -> None:
    bodies = Bodies(100)
    calls = Calls(bodies)
    large = calls.reserve(ONE, 500)
    small = calls.reserve(TWO, 1)
    await settled()
    assert (calls.has, bodies.held) == (1, 500)
    await end(large)
    assert (calls.has, bodies.held) == (2, 1)
    await end(small)


async def test_who_leaves_while_waiting_takes_nothing_along() -> None:
    bodies = Bodies(100)
    calls = Calls(bodies)
    first, second, third = (calls.reserve(ONE, 50) for _ in range(3))
    await settled()
    await end(second)
    await end(first)
    assert (calls.has, bodies.held) == (2, 50)
    await end(third)
    assert bodies.held == 0


async def test_who_finds_no_room_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAIT_S", 0)
    bodies = Bodies(100)
    calls = Calls(bodies)
    held = calls.reserve(ONE, 50)
    await settled()
    with pytest.raises(Overloaded, match=r"hold 50 bytes .* 50 of them this key's, and 10 more"):
        await asyncio.create_task(bodies.reserve(ONE, 10))

    async def take(caller: Caller) -> None:
        bodies.take(caller, 10)

    with pytest.raises(Overloaded):
        await asyncio.create_task(take(ONE))
    await asyncio.create_task(take(TWO))
    await end(held)
    assert bodies.held == 0
