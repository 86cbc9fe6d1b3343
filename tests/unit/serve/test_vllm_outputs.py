"""From vLLM's outputs to chunks: which end is an error, and the end of what nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import RequestStateStats

from packhorse.serve.engines.vllm.outputs import PlainOutputs, refuse_failure, token_logprobs
from packhorse.serve.engines.vllm.patches.request_times import times_of
from packhorse.serve.errors import Invalid, Unavailable
from packhorse.serve.messages import EngineTimes, TokenLogprob


@dataclass
class Entry:
    """vLLM's Logprob."""

    logprob: float
    rank: int
    decoded_token: str | None


class Vocabulary:
    def decode(self, token_ids: list[int]) -> str:
        return f"<{token_ids[0]}>"


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


class Generate:
    """vLLM's `generate` for one request: two outputs, or none for ever."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.hangs = hangs
        self.ends: list[str] = []

    async def outputs(self) -> AsyncGenerator[Any, None]:
        try:
            if self.hangs:
                await asyncio.get_running_loop().create_future()
            yield SimpleNamespace(finished=False)
            yield SimpleNamespace(finished=True)
            self.ends.append("exhausted")
        except (asyncio.CancelledError, GeneratorExit) as error:
            self.ends.append(type(error).__name__)
            raise

    async def abort(self) -> None:
        self.ends.append("aborted")

    def plain(self) -> tuple[PlainOutputs, asyncio.Future[None]]:
        closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        return PlainOutputs(self.outputs(), self.abort, closing), closing


async def test_a_request_that_is_read_to_its_end_is_not_aborted() -> None:
    made = Generate()
    outputs, _ = made.plain()
    assert not (await outputs.get()).finished
    assert (await outputs.get()).finished
    assert made.ends == ["exhausted"]


async def test_a_reader_that_leaves_ends_the_request() -> None:
    made = Generate()
    outputs, _ = made.plain()
    await outputs.get()
    await outputs.abort()
    assert made.ends == ["GeneratorExit", "aborted"]


async def test_a_reader_that_leaves_while_it_waits_ends_the_request() -> None:
    made = Generate(hangs=True)
    outputs, _ = made.plain()
    reading = asyncio.create_task(outputs.get())
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await outputs.abort()
    assert made.ends == ["CancelledError", "aborted"]


async def test_who_waits_is_told_when_the_engine_is_closed() -> None:
    made = Generate(hangs=True)
    outputs, closing = made.plain()
    reading = asyncio.create_task(outputs.get())
    await asyncio.sleep(0.01)
    closing.set_result(None)
    with pytest.raises(EngineDeadError):
        await reading
    assert made.ends == ["CancelledError"]
