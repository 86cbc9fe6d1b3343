"""The bodies that carry messages: chat completions and /tokenize."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serve.errors import Invalid
from serve.messages import (
    ANONYMOUS,
    AUTO_CACHE,
    CachePolicy,
    Caller,
    ChatOptions,
    GenerateRequest,
    Message,
    Sampling,
    ToolChoice,
)
from serve.schema.fields import INT32_MAX, GenerateBody, StrictBody, TokenId

ToolName = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(StrictBody):
    type: Literal["text"]
    text: str


class ToolCallFunction(StrictBody):
    name: str
    arguments: str


class ToolCall(StrictBody):
    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ChatMessage(StrictBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Empty in every answer of ours, and clients send answers back whole.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of role {self.role} needs content")
        return self


class ToolFunction(StrictBody):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictBody):
    type: Literal["function"]
    function: ToolFunction


class NamedFunction(StrictBody):
    name: ToolName


class NamedTool(StrictBody):
    type: Literal["function"]
    function: NamedFunction


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
Tools = Annotated[list[Tool], Field(fail_fast=True, min_length=1, max_length=128)]


class _Conversation(StrictBody):
    """What decides the prompt of a conversation."""

    messages: Messages
    tools: Tools | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _prompt_ends_once(self) -> _Conversation:
        sent = "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and self.add_generation_prompt and sent:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continue_final_message:
            self.add_generation_prompt = False
        for name in ("chat_template", "tokenize"):
            if name in (self.chat_template_kwargs or ()):
                raise ValueError(f"chat_template_kwargs.{name} is the server's to decide")
        return self

    def as_messages(self) -> tuple[Message, ...]:
        return tuple(
            message.model_dump(exclude_none=True, exclude={"annotations"})
            for message in self.messages
        )

    def as_tools(self) -> tuple[dict[str, Any], ...]:
        return tuple(tool.model_dump(exclude_none=True) for tool in self.tools or ())


class ChatBody(_Conversation, GenerateBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=-1, le=INT32_MAX)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    documents: list[dict[str, str]] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _tools_and_logprobs(self) -> ChatBody:
        choice = self.tool_choice
        if self.return_tokens_as_token_ids and not self.logprobs:
            raise ValueError("return_tokens_as_token_ids is about logprobs; ask for them too")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools; send them, or leave it out")
        if self.parallel_tool_calls is not None and not self.tools:
            raise ValueError("parallel_tool_calls needs tools; send them, or leave it out")
        if not self.include_reasoning and (self.return_token_ids or self.logprobs):
            raise ValueError(
                "include_reasoning=false hides tokens that return_token_ids and logprobs would show"
            )
        if isinstance(choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if choice.function.name not in names:
                raise ValueError("tool_choice names a tool that is not among tools")
        if (isinstance(choice, NamedTool) or choice == "required") and self.constraint():
            raise ValueError(
                "a forced tool call has its own form; leave out response_format and "
                "structured_outputs, or let tool_choice be 'auto'"
            )
        return self

    def to_requests(
        self,
        request_id: str,
        caller: Caller = ANONYMOUS,
        timeout_s: float | None = None,
        cache: CachePolicy = AUTO_CACHE,
    ) -> list[GenerateRequest]:
        """Always one. Raises Invalid."""
        limits = {
            limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None
        }
        if len(limits) > 1:
            raise Invalid(
                f"max_tokens={self.max_tokens} and max_completion_tokens="
                f"{self.max_completion_tokens} differ; send one of them.",
                param="max_tokens",
            )
        sampling = self.sampling(
            next(iter(limits), None),
            default_max_tokens=None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )
        request = self.request(request_id, sampling, caller, timeout_s, cache)
        return [replace(request, messages=self.as_messages(), chat=self._options())]

    def _options(self) -> ChatOptions:
        choice: ToolChoice
        if isinstance(self.tool_choice, NamedTool):
            choice = "named"
        else:
            # With tools and no word about them, the model decides, as OpenAI has it.
            choice = self.tool_choice or ("auto" if self.tools else "none")
        named = self.tool_choice
        return ChatOptions(
            tools=self.as_tools(),
            tool_choice=choice,
            named_tool=named.function.name if isinstance(named, NamedTool) else None,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            include_reasoning=self.include_reasoning,
            reasoning_effort=self.reasoning_effort,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            documents=tuple(self.documents or ()),
            template_variables=self.chat_template_kwargs or {},
        )


class TokenizeChatBody(_Conversation):
    """POST /tokenize with messages: the prompt that chat would see."""

    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool | None = None

    def to_request(self, request_id: str, model: str) -> GenerateRequest:
        options = ChatOptions(
            tools=self.as_tools(),
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            template_variables=self.chat_template_kwargs or {},
        )
        return GenerateRequest(
            request_id,
            self.model or model,
            Sampling(),
            messages=self.as_messages(),
            chat=options,
            add_special_tokens=self.add_special_tokens,
        )


class TokenizeTextBody(StrictBody):
    """POST /tokenize with a prompt."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    def to_request(self, request_id: str, model: str) -> GenerateRequest:
        return GenerateRequest(
            request_id,
            self.model or model,
            Sampling(),
            prompt=self.prompt,
            add_special_tokens=self.add_special_tokens,
        )


class DetokenizeBody(StrictBody):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
