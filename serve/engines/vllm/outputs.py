"""vLLM's own outputs as Chunks, and what their ends mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

from packhorse.serve.engines.vllm.patches.request_times import times_of
from packhorse.serve.errors import Invalid, Unavailable
from packhorse.serve.messages import Chunk, TokenLogprob

REASONS = ("stop", "length")
LOWEST = -9999.0  # JSON has no minus infinity; vLLM's server writes this


class PlainOutputs:
    """The outputs of one request, as vLLM's public `generate` makes them."""

    def __init__(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        abort: Callable[[], Awaitable[None]],
        closing: asyncio.Future[None],
    ) -> None:
        """`abort` ends the request by its id. When `closing` is done, the engine is being closed,
        of which vLLM tells nobody.
        """
        self._outputs = outputs
        self._abort = abort
        self._closing = closing

    async def get(self) -> RequestOutput:
        """The next output. Raises the error that ended the request, EngineDeadError among them."""
        step = asyncio.ensure_future(anext(self._outputs))
        try:
            await asyncio.wait((step, self._closing), return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                raise EngineDeadError
        finally:
            if not step.done():
                step.cancel()
                await asyncio.wait((step,))  # else the generator could not be closed
                _ = step.cancelled() or step.exception()
        output = step.result()
        if output.finished:
            async for _ in self._outputs:  # it ends now, and is not left to be aborted
                pass
        return output

    async def abort(self) -> None:
        """End the request in the engine; also one that was only half handed over."""
        await self._outputs.aclose()
        await self._abort()


def refuse_failure(reason: str | None, *, constrained: bool) -> None:
    """Raises Invalid or Unavailable for an end that no client asked for: vLLM's "abort" or "error".

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
