"""From vLLM's outputs to Chunks, at the least cost per token.

vLLM makes two large objects a token and hands them over through an asyncio.Event. For requests with
one choice and no log-probabilities, which are nearly all, the subclasses here make one small Chunk
instead. All else that vLLM does for a token (detokenizing, stop strings, statistics) is left to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import vllm.envs
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from packhorse.serve.engines.vllm.patches import probing
from packhorse.serve.engines.vllm.patches.request_times import times_of
from packhorse.serve.messages import Chunk

NAME = "fast_outputs"
KIND = "speed"
APPLIES_TO = {
    "vllm.v1.engine.output_processor": {
        "RequestOutputCollector": "sha256:8e1734778f67c20b",
        "RequestState.make_request_output": "sha256:d0016d1c149aefc0",
        "RequestState.from_new_request": (
            "call(*, tokenizer, request, prompt, parent_req, request_index, queue, "
            "log_stats, stream_interval)"
        ),
        "OutputProcessor.__init__": "sha256:732dbe2d464fe9ce",
        "OutputProcessor.add_request": "sha256:75e271522715758b",
        "OutputProcessor.process_outputs": "sha256:0493d8cb7c99ddff",
        "OutputProcessor.propagate_error": "call(e)",
    },
    "vllm.v1.engine.async_llm": {
        "AsyncLLM.add_request": "sha256:3bad31ad04862e20",
        "AsyncLLM._add_request": "call(request, prompt, parent_req, index, queue)",
        "AsyncLLM._run_output_handler": "call()",
        "AsyncLLM.abort": "call(request_id, *, internal)",
    },
    "vllm.v1.engine.input_processor": {
        "InputProcessor.process_inputs": (
            "call(request_id, prompt, params, *, supported_tasks, lora_request, priority)"
        ),
        "InputProcessor.assign_request_id": "call(request)",
    },
    "vllm.v1.engine.detokenizer": {
        "BaseIncrementalDetokenizer.get_next_output_text": "call(finished, delta)",
        "IncrementalDetokenizer.num_output_tokens": "call()",
    },
    "vllm.envs": {
        "enable_envs_cache": "call()",
    },
}
WITHOUT = "A streamed token costs the server more CPU time."


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


class FastOutputs:
    """The way of requests with one choice and no log-probabilities, on one engine."""

    def __init__(self, llm: AsyncLLM) -> None:
        """Before the first request, which starts vLLM's handler of outputs."""
        self._llm = llm
        llm.output_processor = ChunkProcessor.in_place_of(llm.output_processor)
        vllm.envs.enable_envs_cache()  # else vLLM asks the environment once a token

    async def submit(
        self,
        request_id: str,
        engine_input: Any,
        params: SamplingParams,
        *,
        lora: LoRARequest | None,
        priority: int,
        reasoning: Mapping[str, Any],
        when_read: Callable[[], None] | None = None,
    ) -> ChunkCollector:
        """Hand a request to the engine: the same steps as AsyncLLM.add_request's, but with a
        collector of our own. `reasoning` are fields of vLLM's request; `when_read` is called when
        the engine has read the prompt of a whole answer.
        """
        llm = self._llm
        if llm.errored:
            raise EngineDeadError
        arguments = (request_id, engine_input, params)
        keywords = {
            "lora_request": lora,
            "supported_tasks": await llm.get_supported_tasks(),
            "priority": priority,
        }
        process = llm.input_processor.process_inputs
        if params.structured_outputs is None:
            made = process(*arguments, **keywords)
        else:  # in a thread, since it compiles a constraint to validate it
            made = await asyncio.to_thread(process, *arguments, **keywords)
        for name, value in reasoning.items():
            setattr(made, name, value)
        llm.input_processor.assign_request_id(made)
        llm._run_output_handler()
        collector = ChunkCollector(made.request_id, when_read)
        try:
            await llm._add_request(made, None, None, 0, collector)
        except BaseException:  # a caller that leaves now may leave it half handed over
            await self.abort(collector)
            raise
        return collector

    async def abort(self, collector: ChunkCollector) -> None:
        """End a request in the engine."""
        await self._llm.abort(collector.request_id, internal=True)

    def fail_requests(self) -> None:
        """End all requests with EngineDeadError: vLLM tells its callers of an engine's death, but
        not of an end that it was asked for.
        """
        self._llm.output_processor.propagate_error(EngineDeadError())


class ChunkCollector:
    """Hands the chunks of one request to the task that reads them, those that wait as one.

    Takes the place of vLLM's RequestOutputCollector, for one reader.
    """

    def __init__(self, request_id: str, when_read: Callable[[], None] | None = None) -> None:
        """`when_read` is called when the engine has read the prompt of a whole answer."""
        self.request_id = request_id
        self.when_read = when_read
        self._waiting: list[Chunk] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: Chunk | Exception) -> None:
        """Called by vLLM's output handler, on the event loop."""
        if isinstance(item, Exception):
            self._error = item
        else:
            self._waiting.append(item)
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)

    async def get(self) -> Chunk:
        """The next chunk. Raises the error that ended the request."""
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if len(self._waiting) == 1:
            return self._waiting.pop()
        chunks, self._waiting = self._waiting, []
        return joined(chunks)


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Consecutive plain chunks as one."""
    first, last = chunks[0], chunks[-1]
    return Chunk(
        "".join(chunk.text for chunk in chunks),
        [token for chunk in chunks for token in chunk.token_ids],
        last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=first.cached_tokens,
        times=last.times,
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
            if self.stream_interval > 1:
                sent: int = self.sent_tokens_offset  # type: ignore[has-type]
                count = detokenizer.num_output_tokens()
                if finish_reason is None and sent and count - sent < self.stream_interval:
                    return None
                new_token_ids = detokenizer.output_token_ids[sent:]
                self.sent_tokens_offset = count
            text = detokenizer.get_next_output_text(finish_reason is not None, True)
        elif finish_reason is None:
            if (when_read := self.queue.when_read) is not None:
                self.queue.when_read = None
                when_read()
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
