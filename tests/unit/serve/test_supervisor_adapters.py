"""Adapters over the deaths of engines."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from packhorse.serve.engines.supervisor import Supervisor
from packhorse.serve.errors import EngineDied, Invalid, Unavailable
from packhorse.serve.messages import AdapterVersion, GenerateRequest, Route
from tests.unit.serve.test_supervisor import Mortal, Works, ask, is_up

pytestmark = pytest.mark.usefixtures("checked_often")


def version(name: str, number: int) -> AdapterVersion:
    return AdapterVersion(name, f"{number:064}", Path(), number, 8)


CLINIC, CODE = version("clinic", 1), version("code", 2)


class Picky(Mortal):
    """Refuses some adapters, and dies of others."""

    refused: frozenset[str] = frozenset()
    deadly: frozenset[str] = frozenset()

    async def load_adapter(self, adapter: AdapterVersion) -> None:
        if self.end.done():
            raise EngineDied("dead before")
        if adapter.name in self.deadly:
            self.die()
            raise EngineDied("died of it")
        if adapter.name in self.refused:
            raise Invalid("not this one")
        await super().load_adapter(adapter)


async def started(
    *, refused: dict[int, str] | None = None, deadly: dict[int, str] | None = None
) -> tuple[Supervisor, Works]:
    """Engines number 1, 2, ... each with the name of an adapter that it refuses or dies of."""
    works = Works()

    def make() -> Picky:
        engine = Picky()
        number = len(works.engines) + 1
        engine.refused = frozenset({(refused or {}).get(number, "")})
        engine.deadly = frozenset({(deadly or {}).get(number, "")})
        return engine

    works.make = make
    return await works.supervisor(), works


async def until_up(supervisor: Supervisor, works: Works, number: int) -> None:
    async with asyncio.timeout(60):
        while not is_up(supervisor, works, number):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def use(supervisor: Supervisor, adapter: AdapterVersion) -> None:
    request: GenerateRequest = ask("one two")
    route = Route("echo", adapter)
    prompt = await supervisor.render(request, route)
    assert [chunk async for chunk in supervisor.generate(prompt, request, route)]


async def test_a_new_engine_has_what_the_last_one_had() -> None:
    supervisor, works = await started()
    await supervisor.load_adapter(CLINIC)
    await supervisor.load_adapter(CODE)
    await supervisor.unload_adapter(CODE)
    works.engines[0].die()
    await until_up(supervisor, works, 2)
    assert works.engines[1].adapters == {CLINIC.engine_name}
    await use(supervisor, CLINIC)
    await supervisor.close()


async def test_one_that_is_refused_is_left_out() -> None:
    supervisor, works = await started(refused={2: "clinic"})
    await supervisor.load_adapter(CLINIC)
    await supervisor.load_adapter(CODE)
    works.engines[0].die()
    await until_up(supervisor, works, 2)
    assert works.engines[1].adapters == {CODE.engine_name}
    works.engines[1].die()
    await until_up(supervisor, works, 3)
    assert works.engines[2].adapters == {CODE.engine_name}
    await supervisor.close()


async def test_one_whose_engine_dies_of_something_else_is_kept() -> None:
    supervisor, works = await started(deadly={2: "clinic"})
    await supervisor.load_adapter(CLINIC)
    works.engines[0].die()
    await until_up(supervisor, works, 3)
    assert works.engines[2].adapters == {CLINIC.engine_name}
    assert supervisor.has_adapter(CLINIC)
    await supervisor.close()


async def test_one_that_kills_two_new_engines_is_left_out() -> None:
    supervisor, works = await started(deadly={2: "clinic", 3: "clinic"})
    await supervisor.load_adapter(CLINIC)
    await supervisor.load_adapter(CODE)
    works.engines[0].die()
    await until_up(supervisor, works, 4)
    assert works.engines[3].adapters == {CODE.engine_name}
    assert works.engines[1].closed
    assert not supervisor.has_adapter(CLINIC)
    await supervisor.close()


async def test_a_load_that_loses_its_engine_is_tried_on_the_next() -> None:
    supervisor, works = await started(deadly={1: "clinic"})
    await supervisor.load_adapter(CLINIC)
    assert len(works.engines) == 2
    assert works.engines[1].adapters == {CLINIC.engine_name}
    await supervisor.close()


async def test_one_that_kills_two_engines_is_given_up() -> None:
    supervisor, works = await started(deadly={1: "clinic", 2: "clinic"})
    with pytest.raises(EngineDied):
        await supervisor.load_adapter(CLINIC)
    await until_up(supervisor, works, 3)
    assert works.engines[2].adapters == set()
    await supervisor.close()


async def test_a_load_when_no_engine_will_be() -> None:
    supervisor, works = await started(deadly={1: "clinic"})
    works.fail = lambda number: True
    with pytest.raises(Unavailable, match="for good"):
        await supervisor.load_adapter(CLINIC)
    await supervisor.unload_adapter(CLINIC)
    await supervisor.close()
