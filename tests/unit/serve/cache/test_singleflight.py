"""One generation, many readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from random import Random

import pytest

from packhorse.serve.cache.codec import joined
from packhorse.serve.cache.single_flight import Flight, Flights
from packhorse.serve.errors import Cancelled, EngineDied, Internal, ServeError
from packhorse.serve.messages import Chunk
from tests.unit.serve.cache.making import settled

A, B, END = Chunk("a", [1]), Chunk("b", [2]), Chunk("c", [3], "stop")


class Steps:
    """A generation that gives what it is fed."""

    request_id = "leader-1"

    def __init__(self) -> None:
        self.fed: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        self.ends: list[tuple[int, str]] = []
        self.has_begun = False
        self.is_aborted = False

    async def ready(self) -> None: ...

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        try:
            while True:
                step = await self.fed.get()
                if isinstance(step, Exception):
                    raise step
                yield step
                if step.finish_reason:
                    return
        except asyncio.CancelledError:
            self.is_aborted = True
            raise

    def begun(self) -> None:
        self.has_begun = True

    def ended(self, completion_tokens: int, outcome: str) -> None:
        self.ends.append((completion_tokens, outcome))


class Flying:
    """A flight that was launched, and what it left."""

    def __init__(self, choices: int = 1) -> None:
        self.flights = Flights()
        self.left: list[tuple[Chunk, ...] | None] = []
        self.flight = self.flights.lead(b"key", self.left.append)
        self.steps = Steps()
        self.leader = self.flight.join()
        self.flight.launch(self.steps, choices)

    def feed(self, *steps: Chunk | Exception) -> None:
        for step in steps:
            self.steps.fed.put_nowait(step)

    async def read(self, *, whole: bool = False) -> list[Chunk]:
        return [chunk async for chunk in self.flight.join().chunks(whole=whole)]


async def test_all_read_all_of_it_from_the_first_chunk_on() -> None:
    flying = Flying()
    early = asyncio.create_task(flying.read())
    flying.feed(A, B)
    await settled()
    late = asyncio.create_task(flying.read())
    whole = asyncio.create_task(flying.read(whole=True))
    await settled()
    assert not early.done()
    assert flying.steps.has_begun
    flying.feed(END)
    assert await early == await late == [A, B, END]
    assert await whole == [Chunk("abc", [1, 2, 3], "stop")]
    assert flying.left == [(Chunk("abc", [1, 2, 3], "stop"),)]
    assert flying.steps.ends == [(3, "ok")]
    assert await flying.read() == [A, B, END], "a reader slower than all of it"


async def test_a_reader_gets_each_chunk_when_it_comes() -> None:
    flying = Flying()
    chunks = flying.leader.chunks(whole=False)
    flying.feed(A)
    assert await anext(chunks) == A
    waiting = asyncio.ensure_future(anext(chunks))
    await settled()
    assert not waiting.done()
    flying.feed(END)
    assert await waiting == END


async def test_it_goes_on_while_anybody_reads() -> None:
    flying = Flying()
    followers = [asyncio.create_task(flying.read()) for _ in range(5)]
    flying.feed(A)
    await settled()
    flying.leader.leave()
    flying.leader.leave()
    followers[0].cancel()
    await settled()
    assert not flying.steps.is_aborted
    flying.feed(END)
    for follower in followers[1:]:
        assert await follower == [A, END]


async def test_it_ends_when_the_last_has_left() -> None:
    flying = Flying()
    follower = flying.flight.join()
    await settled()
    flying.leader.leave()
    assert flying.flights.get(b"key") is flying.flight
    follower.leave()
    assert flying.flights.get(b"key") is None, "nobody joins what is being aborted"
    await settled()
    assert flying.steps.is_aborted
    assert flying.steps.ends == [(0, "cancelled")]
    assert set(flying.left) == {None}


async def test_it_ends_before_it_has_begun() -> None:
    """What it holds must be given back all the same."""
    flying = Flying()
    flying.leader.leave()
    await settled()
    assert flying.steps.ends == [(0, "cancelled")]
    assert flying.flights.get(b"key") is None


@pytest.mark.parametrize(
    ("failure", "error"), [(EngineDied("gone"), EngineDied), (ValueError("bug"), Internal)]
)
async def test_a_failure_is_told_to_all(
    failure: Exception, error: type[ServeError], caplog: pytest.LogCaptureFixture
) -> None:
    flying = Flying()
    readers = [asyncio.create_task(flying.read()) for _ in range(3)]
    flying.feed(A, failure)
    ends = await asyncio.gather(*readers, return_exceptions=True)
    assert [type(end) for end in ends] == [error] * 3
    assert len({id(end) for end in ends}) == 3, "each has its own, with its own traceback"
    assert ("leader-1" in caplog.text) == (error is Internal)
    assert flying.left == [None]
    assert flying.flights.get(b"key") is None
    assert flying.steps.ends == [(1, str(error.kind))]


async def test_a_generation_without_an_end_is_a_failure() -> None:
    class Short(Steps):
        async def chunks(self) -> AsyncGenerator[Chunk, None]:
            yield A

    flights = Flights()
    kept: list[tuple[Chunk, ...] | None] = []
    flight = flights.lead(b"key", kept.append)
    reader = flight.join()
    flight.launch(Short(), 1)
    with pytest.raises(Internal):
        _ = [chunk async for chunk in reader.chunks(whole=False)]
    assert kept == [None]


async def test_a_result_that_cannot_be_kept_is_told_all_the_same() -> None:
    def fails(whole: tuple[Chunk, ...] | None) -> None:
        raise UnicodeEncodeError("utf-8", "", 0, 1, "half a character")

    flight = Flights().lead(b"key", fails)
    reader, steps = flight.join(), Steps()
    flight.launch(steps, 1)
    steps.fed.put_nowait(END)
    assert [chunk async for chunk in reader.chunks(whole=False)] == [END]
    assert steps.ends == [(1, "ok")]


async def test_every_choice_must_end() -> None:
    flying = Flying(choices=2)
    flying.feed(Chunk("x", [1], "stop", 0))
    with pytest.raises(Internal):  # this generation ends at its first choice's end
        await flying.read()


async def test_before_it_is_launched() -> None:
    flights = Flights()
    flight = flights.lead(b"key", lambda _: None)
    waiting = [flight.join() for _ in range(2)]
    reading = [asyncio.create_task(anext(reader.chunks(whole=True))) for reader in waiting]
    await settled()
    flight.settle([A, END])
    assert [await one for one in reading] == [Chunk("ac", [1, 3], "stop")] * 2

    flight = flights.lead(b"key", lambda _: None)
    reader = flight.join()
    flight.fail(Cancelled("left"))
    with pytest.raises(Cancelled):
        await anext(reader.chunks(whole=False))
    assert flights.get(b"key") is None


async def test_a_second_leader_flies_alone() -> None:
    """As a request that wants a fresh answer does."""
    flights = Flights()
    one = flights.lead(b"key", lambda _: None)
    two = flights.lead(b"key", lambda _: None)
    assert flights.get(b"key") is one
    two.settle([END])
    assert flights.get(b"key") is one
    one.settle([END])
    assert flights.get(b"key") is None
    assert isinstance(one, Flight)


@pytest.mark.parametrize("seeds", [range(500), range(500, 1000)])
async def test_whatever_readers_do_they_read_all_of_it_and_nothing_is_left(seeds: range) -> None:
    """Readers join, stop reading for a while, and leave, at any moment: those that stay read every
    chunk once, unless another left who read for both before they had anything; and the generation
    ends with the last.
    """

    async def reads(flying: Flying, chooser: Random, *, leaves: bool) -> list[Chunk] | None:
        flight = flying.flights.get(b"key")
        if flight is None:
            return None
        reader = flight.join()
        whole = chooser.random() < 0.2
        found = []
        try:
            async for chunk in reader.chunks(whole=whole):
                found.append(chunk)
                for _ in range(chooser.choice([0, 0, 1, 5])):
                    await asyncio.sleep(0)
                if leaves and chooser.random() < 0.3:
                    return None
            return list(joined(found))
        except Cancelled:
            assert not found
            return None
        finally:
            reader.leave()

    for seed in seeds:
        chooser = Random(seed)
        flying = Flying()
        chunks = [A, B] * chooser.randrange(4) + [END]
        whole = list(joined(chunks))
        readers = [asyncio.create_task(reads(flying, chooser, leaves=chooser.random() < 0.5))]
        await asyncio.sleep(0)
        flying.leader.leave()
        for chunk in chunks:
            for _ in range(chooser.choice([0, 1, 3])):
                await asyncio.sleep(0)
            if chooser.random() < 0.4 and not flying.flight._is_over:
                leaves = chooser.random() < 0.7
                readers.append(asyncio.create_task(reads(flying, chooser, leaves=leaves)))
            if chooser.random() < 0.2:
                chooser.choice(readers).cancel()
            flying.feed(chunk)
        async with asyncio.timeout(10):
            ends = await asyncio.gather(*readers, return_exceptions=True)
        await settled()
        for end in ends:
            assert end is None or end == whole or isinstance(end, asyncio.CancelledError)
        assert len(flying.steps.ends) >= 1
        assert flying.flights.get(b"key") is None
        assert flying.flight._readers == 0
        assert flying.flight._is_over
        source = flying.flight._source
        assert source is None or source.ag_frame is None, "closed"
