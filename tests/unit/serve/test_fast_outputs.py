"""The chunks of one request on their way to its reader: nothing lost."""

from __future__ import annotations

import asyncio

import pytest

from packhorse.serve.engines.vllm.patches.fast_outputs import ChunkCollector
from packhorse.serve.messages import Chunk, EngineTimes


async def test_chunks_that_wait_are_merged_and_none_is_lost() -> None:
    collector = ChunkCollector("id")
    collector.put(Chunk("a", [1], cached_tokens=3))
    collector.put(Chunk("b", [2, 3]))
    times = EngineTimes(1.0, 2.0, 3.0, 4.0)
    collector.put(Chunk("c", [4], "stop", stop_reason="c", times=times))
    assert await collector.get() == Chunk(
        "abc", [1, 2, 3, 4], "stop", stop_reason="c", cached_tokens=3, times=times
    )


async def test_a_reader_that_waits_gets_each_chunk_at_once() -> None:
    collector = ChunkCollector("id")
    for word in ("a", "b"):
        reading = asyncio.create_task(collector.get())
        await asyncio.sleep(0)
        collector.put(Chunk(word, [1]))
        assert (await reading).text == word


async def test_an_error_comes_after_what_was_there_before_it() -> None:
    collector = ChunkCollector("id")
    collector.put(Chunk("a", [1]))
    collector.put(RuntimeError("gone"))
    assert (await collector.get()).text == "a"
    with pytest.raises(RuntimeError, match="gone"):
        await collector.get()


async def test_a_reader_that_left_does_not_stop_the_writer() -> None:
    collector = ChunkCollector("id")
    reading = asyncio.create_task(collector.get())
    await asyncio.sleep(0)
    reading.cancel()
    collector.put(Chunk("a", [1]))
    assert (await collector.get()).text == "a"
