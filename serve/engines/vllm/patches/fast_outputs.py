"""From vLLM's outputs to Chunks, at the least cost per token.

vLLM makes two large objects a token and hands them over through an asyncio.Event. For requests with
one choice and no log-probabilities, which are nearly all, the subclasses here make one small Chunk
instead. All else that vLLM does for a token (detokenizing, stop strings, statistics) is left to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from packhorse.serve.errors import Invalid, Unavailable
from packhorse.serve.messages import Chunk, EngineTimes, TokenLogprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

REASONS = ("stop", "length")
LOWEST = -9999.0  # JSON has no minus infinity; vLLM's server writes this


class ChunkCollector:
    """Hands the chunks of one request to the task that reads them, and merges those that wait.

    Takes the place of vLLM's RequestOutputCollector: one reader, one waiting item.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._waiting: Chunk | None = None
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: Chunk | Exception) -> None:
        """Called by vLLM's output handler, on the event loop."""
        if isinstance(item, Exception):
            self._error = item
        elif self._waiting is None:
            self._waiting = item
        else:
            self._waiting = joined(self._waiting, item)
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)

    async def get(self) -> Chunk:
        """The next chunk. Raises the error that ended the request."""
        while (chunk := self._waiting) is None:
            if self._error is not None:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        self._waiting = None
        return chunk


def joined(first: Chunk, second: Chunk) -> Chunk:
    """Two consecutive plain chunks as one."""
    return Chunk(
        first.text + second.text,
        [*first.token_ids, *second.token_ids],
        second.finish_reason,
        stop_reason=second.stop_reason,
        cached_tokens=first.cached_tokens,
        times=second.times,
    )


class PlainRequestState(RequestState):
    """vLLM's state of a request in flight, whose output is a Chunk."""

    def make_request_output(
        self,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: int | str | None,
        *_: Any,
        **__: Any,
    ) -> Chunk | None:
        detokenizer = self.detokenizer
        if self.output_kind is RequestOutputKind.DELTA:
            text = detokenizer.get_next_output_text(finish_reason is not None, True)
        elif finish_reason is None:
            return None
        else:
            text = detokenizer.get_next_output_text(True, False)
            new_token_ids = detokenizer.output_token_ids
        return Chunk(
            text,
            new_token_ids,
            # An unknown word ("abort", "error") goes through here, see refuse_failure.
            None if finish_reason is None else str(finish_reason),  # type: ignore[arg-type]
            stop_reason=stop_reason,
            cached_tokens=self.num_cached_tokens,
            times=None if finish_reason is None else times_of(self.stats),
        )


class ChunkProcessor(OutputProcessor):
    """vLLM's output processor, which makes Chunks for requests that bring a ChunkCollector."""

    @classmethod
    def in_place_of(cls, made: OutputProcessor) -> ChunkProcessor:
        """One with the settings of vLLM's own, which has no request yet."""
        return cls(
            made.tokenizer,
            log_stats=made.log_stats,
            stream_interval=made.stream_interval,
            tracing_enabled=made.tracing_enabled,
            admission_stats=made.admission_stats,
        )

    def add_request(
        self,
        request: Any,
        prompt: str | None,
        parent_req: Any = None,
        request_index: int = 0,
        queue: Any = None,
    ) -> None:
        if not isinstance(queue, ChunkCollector):
            super().add_request(request, prompt, parent_req, request_index, queue)
            return
        state = PlainRequestState.from_new_request(
            tokenizer=self.tokenizer,
            request=request,
            prompt=prompt,
            parent_req=None,
            request_index=0,
            queue=queue,
            log_stats=self.log_stats,
            stream_interval=self.stream_interval,
        )
        self.request_states[request.request_id] = state
        self.external_req_ids[state.external_req_id].append(request.request_id)
        self._update_admission_stats()


def times_of(stats: Any) -> EngineTimes | None:
    """Of vLLM's RequestStateStats, which are none when its statistics are off."""
    if stats is None:
        return None
    return EngineTimes(
        stats.queued_ts, stats.scheduled_ts, stats.first_token_ts, stats.last_token_ts
    )


def refuse_failure(reason: str | None, *, constrained: bool) -> None:
    """Raises Invalid or Unavailable for an end that nobody asked for: vLLM's "abort" or "error".

    With a constraint, "error" means that its grammar passed vLLM's checks and did not compile.
    """
    if reason is None or reason in REASONS:
        return
    if constrained and reason == "error":
        raise Invalid(
            "The engine could not compile the constraint on the answer (a schema that refers to "
            "itself without end, or too large a grammar); simplify it.",
            param="structured_outputs",
        )
    raise Unavailable(f"The engine gave up on this ({reason}); send it again.")


def chunks_of(output: RequestOutput, tokenizer: Any) -> Iterable[Chunk]:
    """The choices of one of vLLM's own outputs, with their log-probabilities."""
    prompt_logprobs = None
    if output.prompt_logprobs:
        prompt_logprobs = token_logprobs(
            output.prompt_token_ids or (), output.prompt_logprobs, tokenizer
        )
    completion: CompletionOutput
    for completion in output.outputs:
        token_ids = list(completion.token_ids)
        yield Chunk(
            completion.text,
            token_ids,
            completion.finish_reason,
            index=completion.index,
            stop_reason=completion.stop_reason,
            logprobs=None
            if completion.logprobs is None
            else token_logprobs(token_ids, completion.logprobs, tokenizer),
            prompt_logprobs=prompt_logprobs,
            cached_tokens=output.num_cached_tokens or 0,
            times=None if completion.finish_reason is None else times_of(output.metrics),
        )


def token_logprobs(
    token_ids: Iterable[int], rows: Iterable[Mapping[int, Any] | None], tokenizer: Any
) -> tuple[TokenLogprob, ...]:
    """vLLM's log-probabilities, a row a token: {token id: (logprob, rank, text)}."""
    found = []
    for token_id, row in zip(token_ids, rows, strict=False):
        if row is None or token_id not in row:
            found.append(TokenLogprob(tokenizer.decode([token_id]), token_id, None))
            continue
        ranked = sorted(row.items(), key=lambda item: item[1].rank)
        top = tuple(_one(other, entry, tokenizer) for other, entry in ranked)
        own = row[token_id]
        text = own.decoded_token if own.decoded_token is not None else tokenizer.decode([token_id])
        found.append(TokenLogprob(text, token_id, max(own.logprob, LOWEST), own.rank, top))
    return tuple(found)


def _one(token_id: int, entry: Any, tokenizer: Any) -> TokenLogprob:
    text = entry.decoded_token
    if text is None:
        text = tokenizer.decode([token_id])
    return TokenLogprob(text, token_id, max(entry.logprob, LOWEST), entry.rank)
