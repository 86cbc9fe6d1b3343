"""The body of plain completions: text, token ids, and batches of either."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from packhorse.serve.api.fields import INT32_MAX, GenerateBody, TokenIds
from packhorse.serve.messages import ANONYMOUS, AUTO_CACHE, CachePolicy, Caller, GenerateRequest
from pydantic import Field, model_validator

MAX_ANSWERS = 2048  # prompts x n of one call, OpenAI's own limit on prompts


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
        """Nothing but the prompt is wanted: one token is generated all the same, and dropped."""
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
            # OpenAI's for this endpoint; chat has none.
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
