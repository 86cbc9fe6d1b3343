"""The request bodies: OpenAI's fields, checked strictly. A field that is not here is refused, never
dropped.

Fields without effect here, taken so that existing clients work: `user`, `metadata`, `store`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.errors import Invalid
from serve.messages import GenerateRequest, Sampling

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
INT32_MAX = 2**31 - 1  # what the engine's own integers hold
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ToolCallFunction(_Body):
    name: str
    arguments: str


class ToolCall(_Body):
    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of role {self.role} needs content")
        return self


class ToolFunction(_Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: ToolFunction


class StreamOptions(_Body):
    include_usage: bool = False


class _Generate(_Body):
    """What chat and plain completions share."""

    model: str
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    min_tokens: int = Field(0, ge=0, le=INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=16)] | None = (
        None
    )
    ignore_eos: bool = False
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> _Generate:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true; remove it or stream")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int | None, *, default_max_tokens: int | None) -> Sampling:
        """The sampling fields as sent. Raises Invalid when they contradict each other."""
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise Invalid(
                f"min_tokens={self.min_tokens} is above max_tokens={max_tokens}; lower it.",
                param="min_tokens",
            )
        return Sampling(
            max_tokens=max_tokens,
            default_max_tokens=default_max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
        )


class ChatBody(_Generate):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @model_validator(mode="after")
    def _tools_are_text(self) -> ChatBody:
        if self.tools and self.tool_choice != "none":
            raise ValueError(
                "tool calls are not parsed yet; with tool_choice='none' the model sees the tools "
                "and answers in plain text"
            )
        return self

    def to_request(self, request_id: str) -> GenerateRequest:
        limits = {
            limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None
        }
        if len(limits) > 1:
            raise Invalid(
                f"max_tokens={self.max_tokens} and max_completion_tokens="
                f"{self.max_completion_tokens} differ; send one of them.",
                param="max_tokens",
            )
        return GenerateRequest(
            request_id,
            self.model,
            self.sampling(next(iter(limits), None), default_max_tokens=None),
            messages=tuple(message.model_dump(exclude_none=True) for message in self.messages),
            tools=tuple(tool.model_dump(exclude_none=True) for tool in self.tools or ()),
            stream=bool(self.stream),
        )


class CompletionBody(_Generate):
    """POST /v1/completions."""

    prompt: str | Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]

    def to_request(self, request_id: str) -> GenerateRequest:
        return GenerateRequest(
            request_id,
            self.model,
            # OpenAI's default for this endpoint; chat has none, there the model's room is the
            # limit.
            self.sampling(self.max_tokens, default_max_tokens=16),
            prompt=self.prompt if isinstance(self.prompt, str) else tuple(self.prompt),
            stream=bool(self.stream),
        )
