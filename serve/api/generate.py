"""What every generating endpoint shares: from a validated body to running streams, and from their
chunks to whole choices.

An endpoint adds a body (`to_requests`) and a responder, which turns chunks and choices into the
data of its answers: see chat.py and completions.py. How that data is encoded is the protocol's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import NamedTuple, Protocol
from urllib.parse import quote

from packhorse.serve.errors import ServeError
from packhorse.serve.messages import (
    ANONYMOUS,
    AUTO_CACHE,
    CachePolicy,
    Caller,
    Chunk,
    FinishReason,
    GenerateRequest,
    TokenLogprob,
    ToolCall,
    Trace,
    Usage,
)
from packhorse.serve.pipeline import Pipeline, Stream, merged


class CallContext(NamedTuple):
    """What a protocol knows of a call besides its body."""

    request_id: str
    caller: Caller = ANONYMOUS
    timeout_s: float | None = None
    """How long the call may take; None: the server's default."""
    cache: CachePolicy = AUTO_CACHE
    trace: Trace | None = None


class GeneratingBody(Protocol):
    """A validated body that asks for generated tokens: ChatBody, CompletionBody."""

    def to_requests(
        self,
        request_id: str,
        caller: Caller,
        timeout_s: float | None,
        cache: CachePolicy,
        *,
        default_model: str,
    ) -> list[GenerateRequest]:
        """One request per prompt. Raises Invalid."""
        ...


class RefusalsCounted:
    """A context that counts and logs a ServeError as a refused request: it never became a stream.

    A class, because one made with contextlib costs four times as much, several times a request.
    """

    __slots__ = ("_caller", "_pipeline", "_request_id")

    def __init__(self, pipeline: Pipeline, request_id: str, caller: Caller) -> None:
        self._pipeline = pipeline
        self._request_id = request_id
        self._caller = caller

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ServeError):
            self._pipeline.refused(self._request_id, error, self._caller)


def requests_of(
    pipeline: Pipeline, body: GeneratingBody, context: CallContext
) -> list[GenerateRequest]:
    """The requests that the body asks for. Raises Invalid."""
    requests = body.to_requests(
        context.request_id,
        context.caller,
        context.timeout_s,
        context.cache,
        default_model=pipeline.models.default(context.caller),
    )
    if context.trace is None:
        return requests
    return [replace(request, trace=context.trace) for request in requests]


@dataclass
class CollectedChoice:
    """One choice of an answer, put together from its chunks so far."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        if chunk.reasoning is not None:
            self.reasoning.append(chunk.reasoning)
        self.token_ids.extend(chunk.token_ids)
        self.tool_calls.extend(chunk.tool_calls)
        if chunk.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *chunk.logprobs]
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = chunk.finish_reason
        self.stop_reason = chunk.stop_reason


async def collect(streams: Sequence[Stream]) -> list[CollectedChoice]:
    """Read the streams of one call to their ends and close them. Choice k of prompt i is at
    i x n + k. Raises ServeError.
    """
    per_prompt = streams[0].context.request.sampling.n
    choices = [CollectedChoice() for _ in range(len(streams) * per_prompt)]
    try:
        async with aclosing(merged(streams)) as chunks:
            async for number, chunk in chunks:
                choices[number * per_prompt + chunk.index].add(chunk)
    finally:
        for stream in streams:
            await stream.close()
    return choices


class AnswerHead(NamedTuple):
    """What a whole answer begins with, and all events of a streamed one have in common."""

    id: str
    created: int
    """Unix time in seconds."""
    model: str


def head_of(id_prefix: str, request_id: str, streams: Sequence[Stream]) -> AnswerHead:
    return AnswerHead(id_prefix + request_id, int(time.time()), model_names(streams))


def model_names(streams: Sequence[Stream]) -> str:
    """The models that answer; prompts of one call may be routed to several."""
    return ", ".join(dict.fromkeys(stream.context.route.name for stream in streams))


def total_usage(streams: Sequence[Stream]) -> Usage:
    """The tokens of all prompts of a call, so far."""
    usages = [stream.context.usage for stream in streams]
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        sum(usage.reasoning_tokens for usage in usages),
    )


def answer_metadata(pipeline: Pipeline, streams: Sequence[Stream]) -> dict[str, str]:
    """What an answer says about itself beside its content: the model that answers, the stage of
    routing that chose it, the result cache's part in it, fields without effect, and a lowered
    max_tokens. The prompts of one call may differ in each.
    """
    metadata = {}
    if pipeline.models.has_adapters:
        # Metadata is ASCII; names of folders need not be.
        metadata["x-packhorse-model"] = quote(model_names(streams), safe="/:,@ ")
        metadata["x-packhorse-route"] = ", ".join(sorted({s.context.route.stage for s in streams}))
    if pipeline.models.has_cache:
        metadata["x-packhorse-cache"] = ", ".join(
            sorted({stream.context.cache_status for stream in streams})
        )
    if ignored := dict.fromkeys(name for stream in streams for name in stream.context.ignored):
        metadata["x-packhorse-ignored"] = ", ".join(ignored)
    requested = streams[0].context.request.sampling.max_tokens
    lowest = min(stream.context.prompt.max_tokens for stream in streams)
    if requested is not None and lowest < requested:
        metadata["x-packhorse-max-tokens"] = str(lowest)
    return metadata
