"""Chat completions: the body, and the data of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import AliasChoices, Field, model_validator

from packhorse.serve.api.fields import INT32_MAX, INT64_MAX, GenerateBody
from packhorse.serve.api.generate import AnswerHead, CollectedChoice, head_of, total_usage
from packhorse.serve.api.logprobs import (
    LogprobOptions,
    PromptLogprobs,
    ReportedLogprob,
    prompt_logprobs,
)
from packhorse.serve.api.tools import NamedTool, RequestedToolChoice, ToolCall, Tools
from packhorse.serve.api.validation import LenientBody, Unsupported
from packhorse.serve.messages import (
    ANONYMOUS,
    AUTO_CACHE,
    CachePolicy,
    Caller,
    ChatOptions,
    Chunk,
    Constraint,
    FinishReason,
    GenerateRequest,
    Message,
    Prompt,
    ToolChoice,
    Usage,
)
from packhorse.serve.messages import ToolCall as GeneratedCall
from packhorse.serve.pipeline import Stream

Role = Annotated[str, Field(pattern=r"^[A-Za-z0-9_. -]{1,64}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# Types of content parts that hold text, and the field that holds it.
TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


class ImageUrl(LenientBody):
    url: str


class ContentPart(LenientBody):
    """A part of a message: text, or an image."""

    type: Literal["text", "image_url"] = "text"
    text: str | None = None
    image_url: ImageUrl | None = None
    # From answers that clients send back; without effect.
    annotations: Any = None
    logprobs: Any = None

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> ContentPart:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs the field {self.type}")
        return self

    def as_part(self) -> dict[str, Any]:
        """OpenAI's form."""
        if self.image_url is not None and self.type == "image_url":
            return {"type": "image_url", "image_url": {"url": self.image_url.url}}
        return {"type": "text", "text": self.text}

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Every type of text becomes `text`, and every type of image `image_url`; a part of another
        type stays, to be refused.
        """
        kind = document.get("type", "text")
        if kind in ("image_url", "input_image"):
            image = document.get("image_url")
            if isinstance(image, str):
                image = {"url": image, "detail": document.get("detail")}
            kept = {name: value for name, value in document.items() if name != "detail"}
            return {**kept, "type": "image_url", "image_url": image}
        name = TEXTS.get(kind) if isinstance(kind, str) else None
        if name is None or kind == "text":
            return document
        kept = {each: value for each, value in document.items() if each != name}
        return {**kept, "type": "text", "text": document.get(name)}


class ChatMessage(LenientBody):
    unsupported: ClassVar = {
        "images": Unsupported(([],), "send parts of type image_url as content"),
        "function_call": Unsupported((), "send tool_calls, its present form"),
        "audio": Unsupported((), "send its transcript as content"),
    }

    role: Role
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    reasoning: str | None = Field(
        None, validation_alias=AliasChoices("reasoning", "reasoning_content")
    )
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Fields of answers that clients send back whole; none of them is part of a prompt.
    refusal: str | None = None
    annotations: Any = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Plain strings among the parts of the content become text parts."""
        content = document.get("content")
        if not isinstance(content, list) or not any(isinstance(part, str) for part in content):
            return document
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        return {**document, "content": parts}

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.role in ("user", "system", "developer"):
            raise ValueError(f"a message of role {self.role} needs content")
        parts = self.content if isinstance(self.content, list) else ()
        if self.role != "user" and any(part.type != "text" for part in parts):
            raise ValueError(f"a message of role {self.role} cannot have images; a user's can")
        return self

    def as_message(self) -> Message:
        """OpenAI's form, without the fields that are absent."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.content is None:
            message["content"] = self.refusal or ""
        elif not isinstance(self.content, str):
            message["content"] = [part.as_part() for part in self.content]
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


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]


class Conversation(LenientBody):
    """The fields that decide the prompt of a conversation."""

    messages: Messages
    tools: Tools | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _prompt_ends_once(self) -> Conversation:
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


class ChatBody(Conversation, GenerateBody):
    """POST /v1/chat/completions."""

    unsupported: ClassVar = {
        **GenerateBody.unsupported,
        "echo": Unsupported((False,), "the last message is in the request"),
    }

    max_completion_tokens: int | None = Field(None, ge=-1, le=INT64_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=-1, le=INT32_MAX)
    tool_choice: RequestedToolChoice | None = None
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
            return (*names, "response_format")  # constrains content, and there will be none
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
        limit = self.max_completion_tokens  # OpenAI's current name, which vLLM prefers, too
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
            # OpenAI's default: with tools, the model decides.
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


class ChatChoice(msgspec.Struct, frozen=True):
    """One choice of a chat answer: whole, or the piece of it that one event streams."""

    index: int
    content: str | None
    """None beside tool calls (streamed: or reasoning) when there is no text."""
    reasoning: str | None
    tool_calls: Sequence[GeneratedCall]
    logprobs: Sequence[ReportedLogprob] | None
    finish_reason: FinishReason | None
    """Streamed: in the last piece alone."""
    stop_reason: str | int | None
    token_ids: Sequence[int] | None
    """None unless the request asks for them."""


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """A whole chat answer."""

    head: AnswerHead
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: Sequence[int] | None
    """None unless the request asks for them."""
    prompt_logprobs: PromptLogprobs | None


class ChatResponder:
    """Turns what the engine generates for one chat call into the data of its answer."""

    id_prefix = "chatcmpl-"

    def __init__(self, body: ChatBody) -> None:
        self._body = body
        # Without top_logprobs there are none, although the engine reports the best one.
        self._logprobs = LogprobOptions(
            body.top_logprobs or 0, as_ids=bool(body.return_tokens_as_token_ids)
        )
        self.all_plain = not (body.logprobs or body.return_token_ids)
        """Whether a plain chunk is answered by its text alone."""

    def prompt_token_ids(self, prompt: Prompt) -> Sequence[int] | None:
        return prompt.token_ids if self._body.return_token_ids else None

    def piece(self, index: int, chunk: Chunk, prompt: Prompt) -> ChatChoice:
        """The piece of choice `index` that streams this chunk."""
        has_other = chunk.reasoning is not None or chunk.tool_calls
        return ChatChoice(
            index,
            chunk.text if chunk.text or not has_other else None,
            chunk.reasoning,
            chunk.tool_calls,
            self._reported(chunk),
            chunk.finish_reason,
            chunk.stop_reason,
            chunk.token_ids if self._body.return_token_ids else None,
        )

    def whole(
        self, request_id: str, streams: Sequence[Stream], choices: Sequence[CollectedChoice]
    ) -> ChatAnswer:
        """The answer to a call whose streams have ended."""
        return ChatAnswer(
            head_of(self.id_prefix, request_id, streams),
            [self._choice(index, choice) for index, choice in enumerate(choices)],
            total_usage(streams),
            self.prompt_token_ids(streams[0].context.prompt),
            prompt_logprobs(self._body.prompt_logprobs, choices[0].prompt_logprobs),
        )

    def _choice(self, index: int, choice: CollectedChoice) -> ChatChoice:
        text = choice.text
        return ChatChoice(
            index,
            None if choice.tool_calls and not text else text,
            "".join(choice.reasoning) if choice.reasoning else None,
            choice.tool_calls,
            self._reported(choice),
            choice.finish_reason,
            choice.stop_reason,
            choice.token_ids if self._body.return_token_ids else None,
        )

    def _reported(self, part: Chunk | CollectedChoice) -> list[ReportedLogprob] | None:
        return None if part.logprobs is None else self._logprobs.reported(part.logprobs)
