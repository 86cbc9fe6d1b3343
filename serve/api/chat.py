"""The bodies that carry messages: chat completions and /tokenize."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from packhorse.serve.api.fields import INT32_MAX, INT64_MAX, GenerateBody, TokenId
from packhorse.serve.api.unknown_fields import LenientBody, Unsupported
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import (
    ANONYMOUS,
    AUTO_CACHE,
    CachePolicy,
    Caller,
    ChatOptions,
    Constraint,
    GenerateRequest,
    Message,
    Sampling,
    ToolChoice,
)
from pydantic import AliasChoices, Field, model_validator

ToolName = Annotated[str, Field(min_length=1, max_length=256)]
Role = Annotated[str, Field(pattern=r"^[A-Za-z0-9_. -]{1,64}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# Kinds of content that are text, with the field that has it.
TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


class TextPart(LenientBody):
    type: Literal["text"] = "text"
    text: str
    # In parts of answers.
    annotations: Any = None
    logprobs: Any = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Every kind of text as `text`; a part of another kind stays, to be refused."""
        kind = document.get("type", "text")
        name = TEXTS.get(kind) if isinstance(kind, str) else None
        if name is None or kind == "text":
            return document
        kept = {each: value for each, value in document.items() if each != name}
        return {**kept, "type": "text", "text": document.get(name)}


class ToolCallFunction(LenientBody):
    name: str
    arguments: str = "{}"

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Arguments as an object, as some clients keep them, are its text."""
        if not isinstance(document.get("arguments"), dict):
            return document
        try:
            arguments = json.dumps(document["arguments"], ensure_ascii=False)
        except RecursionError as error:
            raise Invalid("The arguments of a tool call are nested too deeply.") from error
        return {**document, "arguments": arguments}


class ToolCall(LenientBody):
    index: int | None = None
    """Of streamed pieces, which some clients put together with it."""
    id: str = ""
    type: Literal["function"] = "function"
    function: ToolCallFunction


class ChatMessage(LenientBody):
    unsupported: ClassVar = {
        "images": Unsupported(([],), "this server reads text alone"),
        "function_call": Unsupported((), "send tool_calls, its present form"),
        "audio": Unsupported((), "send its transcript as content"),
    }

    role: Role
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    reasoning: str | None = Field(
        None, validation_alias=AliasChoices("reasoning", "reasoning_content")
    )
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # In answers, which clients send back whole: none of it is part of a prompt.
    refusal: str | None = None
    annotations: Any = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Content as a list may have plain strings among its parts."""
        content = document.get("content")
        if not isinstance(content, list) or not any(isinstance(part, str) for part in content):
            return document
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        return {**document, "content": parts}

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.role in ("user", "system", "developer"):
            raise ValueError(f"a message of role {self.role} needs content")
        return self

    def as_message(self) -> Message:
        """OpenAI's shape, without what is absent."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.content is None:
            message["content"] = self.refusal or ""
        elif not isinstance(self.content, str):
            message["content"] = [{"type": "text", "text": part.text} for part in self.content]
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in self.tool_calls
            ]
            if self.content is None and not self.refusal:
                del message["content"]
        for name in ("name", "reasoning", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message


class ToolFunction(LenientBody):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(LenientBody):
    type: Literal["function"] = "function"
    function: ToolFunction


class NamedFunction(LenientBody):
    name: ToolName


class NamedTool(LenientBody):
    type: Literal["function"] = "function"
    function: NamedFunction


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=128)]


class _Conversation(LenientBody):
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
        for name in ("chat_template", "tokenize", "messages", "tools"):
            if name in (self.chat_template_kwargs or ()):
                raise ValueError(f"chat_template_kwargs.{name} is the server's to decide")
        return self

    def as_messages(self) -> tuple[Message, ...]:
        return tuple(message.as_message() for message in self.messages)

    def as_tools(self) -> tuple[dict[str, Any], ...]:
        return tuple(tool.model_dump(exclude_none=True) for tool in self.tools or ())


class ChatBody(_Conversation, GenerateBody):
    """POST /v1/chat/completions."""

    unsupported: ClassVar = {
        **GenerateBody.unsupported,
        "echo": Unsupported((False,), "the last message is in the request"),
    }

    max_completion_tokens: int | None = Field(None, ge=-1, le=INT64_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=-1, le=INT32_MAX)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    reasoning_effort: Effort | None = None
    documents: list[dict[str, str]] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _tools_and_logprobs(self) -> ChatBody:
        choice = self.tool_choice
        if (self.max_completion_tokens is None and self.max_tokens == 0) or (
            self.max_completion_tokens == 0
        ):
            raise ValueError("max_tokens=0 leaves no answer; ask for at least one token")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools; send them, or leave it out")
        if not self.include_reasoning and (self.return_token_ids or self.logprobs):
            raise ValueError(
                "include_reasoning=false hides tokens that return_token_ids and logprobs would show"
            )
        if isinstance(choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if choice.function.name not in names:
                raise ValueError("tool_choice names a tool that is not among tools")
        if self._forces_a_call and self.structured_outputs is not None:
            raise ValueError(
                "a forced tool call has its own form; leave out structured_outputs, or let "
                "tool_choice be 'auto'"
            )
        return self

    @property
    def _forces_a_call(self) -> bool:
        return self.tool_choice not in (None, "none", "auto")

    @property
    def ignored(self) -> tuple[str, ...]:
        names = super().ignored
        if self.response_format is not None and self._forces_a_call:
            return (*names, "response_format")  # it is about content, and there will be none
        return names

    def constraint(self) -> Constraint | None:
        return None if self._forces_a_call else super().constraint()

    def to_requests(
        self,
        request_id: str,
        caller: Caller = ANONYMOUS,
        timeout_s: float | None = None,
        cache: CachePolicy = AUTO_CACHE,
        *,
        default_model: str = "",
    ) -> list[GenerateRequest]:
        """Always one. Raises Invalid."""
        limit = self.max_completion_tokens  # OpenAI's present name; vLLM prefers it, too
        if limit is None:
            limit = self.max_tokens
        sampling = self.sampling(
            None if limit == -1 else limit,
            default_max_tokens=None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )
        request = self.request(request_id, sampling, caller, timeout_s, cache, default_model)
        return [replace(request, messages=self.as_messages(), chat=self._options())]

    def _options(self) -> ChatOptions:
        choice: ToolChoice
        if not self.tools:
            choice = "none"
        elif isinstance(self.tool_choice, NamedTool):
            choice = "named"
        else:
            # With tools and no word about them, the model decides, as OpenAI has it.
            choice = self.tool_choice or "auto"
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

    unsupported: ClassVar = {"chat_template": GenerateBody.unsupported["chat_template"]}

    documents: list[dict[str, str]] | None = None
    reasoning_effort: Effort | None = None
    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool | None = None

    def to_request(self, request_id: str, model: str) -> GenerateRequest:
        options = ChatOptions(
            tools=self.as_tools(),
            reasoning_effort=self.reasoning_effort,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            documents=tuple(self.documents or ()),
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


class TokenizeTextBody(LenientBody):
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


class DetokenizeBody(LenientBody):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
