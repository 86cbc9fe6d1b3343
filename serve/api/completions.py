"""Plain completions: the body (text, token ids, or a batch of either), and its answer's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from pydantic import Field, model_validator

from packhorse.serve.api.fields import INT32_MAX, GenerateBody, TokenIds
from packhorse.serve.api.generate import AnswerHead, CollectedChoice, head_of, total_usage
from packhorse.serve.api.logprobs import (
    LogprobOptions,
    OffsetLogprobs,
    PromptLogprobs,
    prompt_logprobs,
)
from packhorse.serve.messages import (
    ANONYMOUS,
    AUTO_CACHE,
    CachePolicy,
    Caller,
    Chunk,
    FinishReason,
    GenerateRequest,
    Prompt,
    TokenLogprob,
    Usage,
)
from packhorse.serve.pipeline import Stream

MAX_ANSWERS = 2048  # prompts x n of one call; OpenAI has this limit on prompts


class CompletionBody(GenerateBody):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_ANSWERS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_ANSWERS)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=-1, le=INT32_MAX)

    @model_validator(mode="after")
    def _fits(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 needs echo=true; ask for at least one token")
        choices = len(self.prompts()) * (self.n or 1)
        if choices > MAX_ANSWERS:
            raise ValueError(f"prompts x n is {choices}, above the limit of {MAX_ANSWERS}")
        return self

    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts of a batch; one where one was sent."""
        sent: Any = self.prompt
        if isinstance(sent, str) or isinstance(sent[0], int):
            sent = [sent]
        return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in sent]

    @property
    def echo_only(self) -> bool:
        """Whether only the prompt is wanted. One token is generated all the same, and dropped."""
        return self.max_tokens == 0

    def to_requests(
        self,
        request_id: str,
        caller: Caller = ANONYMOUS,
        timeout_s: float | None = None,
        cache: CachePolicy = AUTO_CACHE,
        *,
        default_model: str = "",
    ) -> list[GenerateRequest]:
        """One request a prompt. Raises Invalid."""
        prompt_logprobs = self.prompt_logprobs
        if prompt_logprobs is None and self.echo:
            prompt_logprobs = self.logprobs
        sampling = self.sampling(
            1 if self.echo_only else self.max_answer_tokens,
            # OpenAI's default for this endpoint; chat has none.
            default_max_tokens=16 if self.max_tokens is None else None,
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        request = self.request(request_id, sampling, caller, timeout_s, cache, default_model)
        prompts = self.prompts()
        return [
            replace(
                request,
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{number}",
                prompt=prompt,
                ignored=request.ignored if number == 0 else (),  # counted once a call
                echo=bool(self.echo),
            )
            for number, prompt in enumerate(prompts)
        ]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One choice of a completion: whole, or the piece of it that one event streams."""

    index: int
    text: str
    """With `echo`, the prompt's text stands before the answer's, once a choice."""
    logprobs: OffsetLogprobs | None
    """With `echo`, those of the prompt come first; None unless the request asks for them."""
    finish_reason: FinishReason | None
    """Streamed: in the last piece alone."""
    stop_reason: str | int | None
    token_ids: Sequence[int] | None
    """None unless the request asks for them."""
    prompt_token_ids: Sequence[int] | None
    """With token_ids, once a choice."""
    prompt_logprobs: PromptLogprobs | None = None
    """Never streamed."""


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """A whole answer to a call of plain completions. Choice k of prompt i is at i x n + k."""

    head: AnswerHead
    choices: list[CompletionChoice]
    usage: Usage


class CompletionResponder:
    """Turns what the engine generates for one call of plain completions into the data of its
    answer.
    """

    id_prefix = "cmpl-"

    def __init__(self, body: CompletionBody) -> None:
        self._body = body
        self._logprobs = LogprobOptions(
            body.logprobs or 0, as_ids=bool(body.return_tokens_as_token_ids)
        )
        self._offsets: dict[int, int] = {}  # choice -> characters sent
        self._begun: set[int] = set()  # choices of which a piece was sent
        self.all_plain = body.logprobs is None and not (body.return_token_ids or body.echo)
        """Whether a plain chunk is answered by its text alone."""

    def prompt_token_ids(self, prompt: Prompt) -> Sequence[int] | None:
        """Never beside the choices: each choice has its own prompt's."""
        return None

    def piece(self, index: int, chunk: Chunk, prompt: Prompt) -> CompletionChoice:
        """The piece of choice `index` that streams this chunk."""
        choice = CollectedChoice()
        choice.add(chunk)
        is_first = index not in self._begun
        self._begun.add(index)
        return self._choice(index, choice, prompt, with_prompt=is_first)

    def whole(
        self, request_id: str, streams: Sequence[Stream], choices: Sequence[CollectedChoice]
    ) -> CompletionAnswer:
        """The answer to a call whose streams have ended."""
        per_prompt = len(choices) // len(streams)
        made = []
        for index, collected in enumerate(choices):
            prompt = streams[index // per_prompt].context.prompt
            choice = self._choice(
                index,
                collected,
                prompt,
                with_prompt=True,
                reported=prompt_logprobs(self._body.prompt_logprobs, collected.prompt_logprobs),
            )
            made.append(choice)
        return CompletionAnswer(
            head_of(self.id_prefix, request_id, streams), made, total_usage(streams)
        )

    def _choice(
        self,
        index: int,
        choice: CollectedChoice,
        prompt: Prompt,
        *,
        with_prompt: bool,
        reported: PromptLogprobs | None = None,
    ) -> CompletionChoice:
        body = self._body
        text = "" if body.echo_only else choice.text
        logprobs = [] if body.echo_only else list(choice.logprobs or ())
        if with_prompt and body.echo:
            text = (prompt.text or "") + text
            logprobs = [*(choice.prompt_logprobs or ()), *logprobs]
        return CompletionChoice(
            index,
            text,
            None if body.logprobs is None else self._offset_logprobs(index, logprobs),
            choice.finish_reason,
            choice.stop_reason,
            choice.token_ids if body.return_token_ids else None,
            prompt.token_ids if body.return_token_ids and with_prompt else None,
            reported,
        )

    def _offset_logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> OffsetLogprobs:
        reported = self._logprobs.reported(entries)
        offset = self._offsets.get(index, 0)
        offsets = []
        for entry in reported:
            offsets.append(offset)
            offset += len(entry.name)
        self._offsets[index] = offset
        return OffsetLogprobs(reported, offsets)
