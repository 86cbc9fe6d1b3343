"""From vLLM's outputs to chunks: nothing lost on the way, errors told apart."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from packhorse.serve.engines.vllm.patches.fast_outputs import (
    ChunkCollector,
    refuse_failure,
    times_of,
    token_logprobs,
)
from packhorse.serve.errors import Invalid, Unavailable
from packhorse.serve.messages import Chunk, EngineTimes, TokenLogprob
from vllm.v1.metrics.stats import RequestStateStats


@dataclass
class Entry:
    """vLLM's Logprob."""

    logprob: float
    rank: int
    decoded_token: str | None


class Vocabulary:
    def decode(self, token_ids: list[int]) -> str:
        return f"<{token_ids[0]}>"


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


def test_the_engines_times_are_vllms() -> None:
    stats = RequestStateStats(queued_ts=1, scheduled_ts=2, first_token_ts=3, last_token_ts=4)
    assert times_of(stats) == EngineTimes(1, 2, 3, 4)
    assert times_of(None) is None  # its statistics are off


def test_log_probabilities_come_best_first_with_the_tokens_own() -> None:
    row = {7: Entry(-3.0, 9, "g"), 1: Entry(-0.1, 1, "a"), 2: Entry(float("-inf"), 2, None)}
    (found,) = token_logprobs([7], [row], Vocabulary())
    assert found == TokenLogprob(
        "g",
        7,
        -3.0,
        9,
        (
            TokenLogprob("a", 1, -0.1, 1),
            TokenLogprob("<2>", 2, -9999.0, 2),  # JSON has no infinity
            TokenLogprob("g", 7, -3.0, 9),
        ),
    )


def test_the_first_token_of_a_prompt_has_no_log_probability() -> None:
    assert token_logprobs([7], [None], Vocabulary()) == (TokenLogprob("<7>", 7, None),)


@pytest.mark.parametrize(
    ("reason", "constrained", "error"),
    [("abort", False, Unavailable), ("error", False, Unavailable), ("error", True, Invalid)],
)
def test_an_end_that_nobody_asked_for_is_an_error(
    reason: str, constrained: bool, error: type[Exception]
) -> None:
    with pytest.raises(error):
        refuse_failure(reason, constrained=constrained)


@pytest.mark.parametrize("reason", [None, "stop", "length"])
def test_an_ordinary_end_is_none(reason: str | None) -> None:
    refuse_failure(reason, constrained=True)
