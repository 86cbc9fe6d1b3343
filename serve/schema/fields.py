"""The request bodies: OpenAI's fields and vLLM's own, checked strictly. A field that is not here is
refused, never dropped; those without effect are listed in docs/api.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.errors import Invalid
from serve.messages import (
    ANONYMOUS,
    AUTO_CACHE,
    CacheMode,
    CachePolicy,
    Caller,
    Constraint,
    GenerateRequest,
    Sampling,
)

INT32_MAX = 2**31 - 1  # what the engine's own integers hold
INT64_MAX = 2**63 - 1
MAX_ANSWERS = 2048  # prompts x n of one call, OpenAI's own limit on prompts

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Field(fail_fast=True, max_length=4)]  # OpenAI's limit
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def refuse_half_characters(document: Any) -> None:
    """Raises ValueError for an escaped half of a surrogate pair: valid JSON, but no text."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError("there is half a character in it") from error


class StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(StrictBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(StrictBody):
    """OpenAI's named schema; name and description are for people."""

    name: str = Field(max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_fits_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type 'json_schema', and only that, comes with a json_schema")
        return self


class StructuredOutputs(StrictBody):
    """vLLM's own form of a constraint: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1)
    choice: Annotated[list[StopString], Field(fail_fast=True, min_length=1)] | None = None
    grammar: str | None = Field(None, min_length=1)
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar and json_object")
        return self

    @field_validator("json_")
    @classmethod
    def _is_a_schema(cls, value: dict[str, Any] | str | None) -> Any:
        """A schema may come as text too; bounds are checked on what it says."""
        if not isinstance(value, str):
            return value
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("the schema's text is not JSON") from error
        if not isinstance(schema, dict):
            raise ValueError("the schema must be a JSON object")
        refuse_half_characters(schema)
        return schema

    def constraint(self) -> Constraint:
        if self.json_ is not None:
            return Constraint("json", self.json_)
        if self.regex is not None:
            return Constraint("regex", self.regex)
        if self.choice is not None:
            return Constraint("choice", tuple(self.choice))
        if self.grammar is not None:
            return Constraint("grammar", self.grammar)
        return Constraint("json_object", True)


class CacheOptions(StrictBody):
    """What to do with the result cache, see docs/caching.md."""

    mode: CacheMode = "auto"
    max_age_s: float | None = Field(None, ge=0)

    def policy(self) -> CachePolicy:
        return CachePolicy(self.mode, self.max_age_s)


class GenerateBody(StrictBody):
    """What chat and plain completions share."""

    model: str
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    min_tokens: int = Field(0, ge=0, le=INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), le=INT64_MAX)
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Annotated[dict[str, Bias], Field(fail_fast=True, max_length=1024)] | None = None
    bad_words: Annotated[list[StopString], Field(fail_fast=True, max_length=256)] | None = None
    allowed_token_ids: TokenIds | None = None
    prompt_logprobs: int | None = Field(None, ge=-1, le=INT32_MAX)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=INT32_MAX)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int = Field(0, ge=-INT32_MAX, le=INT32_MAX)
    timeout_s: float | None = Field(None, gt=0)
    cache: CacheOptions | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Without effect here, taken so that existing clients work.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError("the keys must be token ids")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GenerateBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true; remove it or stream")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs are not streamed; leave out one of the two")
        plain = self.response_format is None or self.response_format.type == "text"
        if not plain and self.structured_outputs is not None:
            raise ValueError("send either response_format or structured_outputs, not both")
        if self.seed is not None and self.seed > INT64_MAX - (self.n or 1):
            raise ValueError("with n choices the seeds are seed to seed+n-1; choose a lower seed")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def constraint(self) -> Constraint | None:
        """What the answer must look like, from either of the two fields that may say it."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.json_schema is not None:
            return Constraint("json", wanted.json_schema.schema_)
        return Constraint("json_object", True)

    def sampling(
        self,
        max_tokens: int | None,
        *,
        default_max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> Sampling:
        """The sampling fields as sent. Raises Invalid when they contradict each other."""
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise Invalid(
                f"min_tokens={self.min_tokens} is above max_tokens={max_tokens}; lower it.",
                param="min_tokens",
            )
        allowed = self.allowed_token_ids
        return Sampling(
            max_tokens=max_tokens,
            default_max_tokens=default_max_tokens,
            min_tokens=self.min_tokens,
            n=self.n or 1,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            bad_words=tuple(self.bad_words or ()),
            allowed_token_ids=None if allowed is None else tuple(allowed),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=self.constraint(),
        )

    def request(
        self,
        request_id: str,
        sampling: Sampling,
        caller: Caller,
        timeout_s: float | None,
        cache: CachePolicy,
    ) -> GenerateRequest:
        """What every request has; its prompt or messages are for the endpoint to add."""
        return GenerateRequest(
            request_id,
            self.model,
            sampling,
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            priority=self.priority,
            stream=bool(self.stream),
            caller=caller,
            timeout_s=timeout_s,
            cache=cache,
            cache_salt=self.cache_salt,
        )


class CompletionBody(GenerateBody):
    """POST /v1/completions."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_ANSWERS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_ANSWERS)]
    )
    max_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=-1, le=INT32_MAX)

    @model_validator(mode="after")
    def _fits(self) -> CompletionBody:
        if self.return_tokens_as_token_ids and self.logprobs is None:
            raise ValueError("return_tokens_as_token_ids is about logprobs; ask for them too")
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
    ) -> list[GenerateRequest]:
        """One request a prompt. Raises Invalid."""
        prompt_logprobs = self.prompt_logprobs
        if prompt_logprobs is None and self.echo:
            prompt_logprobs = self.logprobs
        sampling = self.sampling(
            1 if self.echo_only else self.max_tokens,
            default_max_tokens=16,  # OpenAI's for this endpoint; chat has none
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        request = self.request(request_id, sampling, caller, timeout_s, cache)
        prompts = self.prompts()
        return [
            replace(
                request,
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{number}",
                prompt=prompt,
                echo=bool(self.echo),
            )
            for number, prompt in enumerate(prompts)
        ]
