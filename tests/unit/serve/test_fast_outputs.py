"""The chunks of one request on their way to its reader: nothing lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import RequestState

from packhorse.serve.engines.vllm.patches.fast_outputs import ChunkCollector, PlainRequestState
from packhorse.serve.messages import Chunk, EngineTimes

DEMO_MODEL = Path(__file__).resolve().parents[3] / "demo/model"


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


class Counted(str):
    """A text that counts how many characters were copied by adding to it."""

    copied = 0

    def __add__(self, other: str) -> Counted:
        Counted.copied += len(self) + len(other)
        return Counted(str(self) + other)


async def test_a_reader_that_stays_away_costs_no_more_for_each_token() -> None:
    collector = ChunkCollector("id")
    for number in range(20_000):
        collector.put(Chunk(Counted("word"), [number]))
    assert Counted.copied == 0
    chunk = await collector.get()
    assert (len(chunk.text), list(chunk.token_ids)) == (80_000, list(range(20_000)))


def state_of(
    kind: type[RequestState], *, interval: int, whole: bool = False, queue: Any = None
) -> Any:
    """A request in flight, as vLLM makes it."""
    output_kind = RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA
    request = EngineCoreRequest(
        request_id="r",
        external_req_id="r",
        prompt_token_ids=[5, 6],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=64, output_kind=output_kind),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return kind.from_new_request(
        tokenizer=get_tokenizer(str(DEMO_MODEL)),
        request=request,
        prompt=None,
        parent_req=None,
        request_index=0,
        queue=queue,
        log_stats=False,
        stream_interval=interval,
    )


def outputs_of(state: Any, count: int) -> list[Any]:
    made = []
    for number in range(count):
        token, is_last = 100 + number, number + 1 == count
        state.detokenizer.update([token], False)
        reason = FinishReason.LENGTH if is_last else None
        made.append(state.make_request_output([token], None, reason, None))
    return [output for output in made if output is not None]


@pytest.mark.parametrize("interval", [1, 2, 3, 10])
@pytest.mark.parametrize("count", [1, 2, 7, 12, 21])
def test_streams_with_an_interval_are_cut_as_by_vllm(interval: int, count: int) -> None:
    theirs = outputs_of(state_of(RequestState, interval=interval), count)
    ours = outputs_of(state_of(PlainRequestState, interval=interval), count)
    assert [(chunk.text, list(chunk.token_ids), chunk.finish_reason) for chunk in ours] == [
        (one.text, list(one.token_ids), one.finish_reason)
        for output in theirs
        for one in output.outputs
    ]


def test_of_a_whole_answer_the_moment_is_told_when_the_prompt_is_read() -> None:
    calls = []
    collector = ChunkCollector("id", lambda: calls.append(None))
    state = state_of(PlainRequestState, interval=1, whole=True, queue=collector)
    assert not calls
    (whole,) = outputs_of(state, 9)
    assert len(calls) == 1
    assert len(whole.token_ids) == 9
