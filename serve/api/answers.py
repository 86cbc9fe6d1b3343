"""Whole answers, put together from chunks; what HTTP and gRPC both need and neither words."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from urllib.parse import quote

from packhorse.serve.messages import Chunk, FinishReason, TokenLogprob, ToolCall, Usage
from packhorse.serve.stream import Stream, merged


@dataclass
class Answer:
    """One choice, as far as it has come."""

    parts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, chunk: Chunk) -> None:
        self.parts.append(chunk.text)
        if chunk.reasoning is not None:
            self.reasoning.append(chunk.reasoning)
        self.token_ids.extend(chunk.token_ids)
        self.tool_calls.extend(chunk.tool_calls)
        if chunk.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *chunk.logprobs]
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = chunk.finish_reason
        self.stop_reason = chunk.stop_reason


async def collect(streams: Sequence[Stream]) -> dict[int, Answer]:
    """All choices, by index, to their ends. Raises ServeError."""
    choices: dict[int, Answer] = {}
    per_prompt = streams[0].request.sampling.n
    async with aclosing(merged(streams)) as chunks:
        async for number, chunk in chunks:
            choices.setdefault(number * per_prompt + chunk.index, Answer()).add(chunk)
    return choices


def sum_of(usages: Sequence[Usage]) -> Usage:
    """Of a call's prompts."""
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        sum(usage.reasoning_tokens for usage in usages),
    )


def headers_of(streams: Sequence[Stream], *, has_adapters: bool, has_cache: bool) -> dict[str, str]:
    """What answers say of themselves, in headers or trailers: who answers, which stage of routing
    chose it, what the result cache had to do with it, and what of the request had no effect. One
    call's prompts may differ in each.
    """
    headers = {}
    if has_adapters:
        # Headers are ASCII, names of folders need not be.
        headers["x-packhorse-model"] = quote(names_of(streams), safe="/:,@ ")
        headers["x-packhorse-route"] = ", ".join(sorted({s.route.stage for s in streams}))
    if has_cache:
        headers["x-packhorse-cache"] = ", ".join(sorted({stream.mark for stream in streams}))
    if ignored := dict.fromkeys(name for stream in streams for name in stream.ignored):
        headers["x-packhorse-ignored"] = ", ".join(ignored)
    asked = streams[0].request.sampling.max_tokens
    lowest = min(stream.prompt.max_tokens for stream in streams)
    if asked is not None and lowest < asked:
        headers["x-packhorse-max-tokens"] = str(lowest)
    return headers


def names_of(streams: Sequence[Stream]) -> str:
    """Who answers; prompts of one call may be routed to several."""
    return ", ".join(dict.fromkeys(stream.route.name for stream in streams))
