"""Anthropic's Messages API: the body, and its translation to a chat completion.

A message is answered as the chat completion that it translates to: validation, sampling, tools,
constraints and the result cache are chat's (chat.py). What becomes of the answer is in
anthropic_answers.py. Called by the front ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from packhorse.serve.api.chat import ChatBody, Effort
from packhorse.serve.api.fields import INT64_MAX, GenerateBody, StopStrings
from packhorse.serve.api.generate import (
    CallContext,
    requests_of,
)
from packhorse.serve.api.validation import LenientBody, validated
from packhorse.serve.errors import Invalid
from packhorse.serve.ignored import told
from packhorse.serve.messages import (
    ANONYMOUS,
    AUTO_CACHE,
    CachePolicy,
    Caller,
    GenerateRequest,
)
from packhorse.serve.pipeline import Pipeline

# A part of a chat message: a text, or an image in OpenAI's form.
Part = str | dict[str, Any]
# What a type may be called in errors and headers.
Kind = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]
# How the part of Claude Code's system prompt begins that counts its requests. It differs from one
# request to the next, so no two of them would share a block of the prefix cache.
BILLING = "x-anthropic-billing-header"
# Types of blocks that each role's messages may hold.
BLOCKS = {
    "system": {"text"},
    "user": {"text", "image", "document", "search_result", "tool_result"},
    "assistant": {"text", "thinking", "redacted_thinking", "tool_use"},
}
IN_RESULTS = {"text", "image", "document", "search_result", "tool_reference"}
INSTEAD = {
    "container_upload": "this server keeps no containers; send the file's text",
    "server_tool_use": "this server runs no tools; leave the block and its result out",
    "tool_addition": "send all tools in `tools`",
    "tool_removal": "send the tools that are left in `tools`",
}
"""Types of blocks that are refused -> why, and what to send."""
# Fields of a chat completion that a message may have, too. Others have no place in its answer.
_NOT_CHATS = {"n", "stop", "stream_options", "prompt_logprobs", "return_token_ids",
              "return_tokens_as_token_ids"}  # fmt: skip
_PASSED = frozenset(GenerateBody.model_fields) - _NOT_CHATS - GenerateBody.no_effect


def _refused(kind: str) -> ValueError:
    instead = INSTEAD.get(kind, "send its text in a block of type text")
    return ValueError(f"a block of type {kind} is not supported here: {instead}")


class TextBlock(LenientBody):
    type: Literal["text"] = "text"
    text: str
    cache_control: Any = None  # a hint; every prefix is cached here
    citations: Any = None


Texts = Annotated[list[TextBlock], Field(fail_fast=True)]


class Source(LenientBody):
    """Where a document's or an image's content is."""

    type: Kind
    media_type: str | None = None
    data: str | None = None
    content: str | Texts | None = None
    url: str | None = None

    @property
    def is_text(self) -> bool:
        field = {"text": self.data, "content": self.content}.get(self.type)
        return field is not None

    @property
    def image_url(self) -> str | None:
        """Of an image, as chat takes it; None for what is no image."""
        if self.type == "base64" and self.media_type and self.data is not None:
            return f"data:{self.media_type};base64,{self.data}"
        return self.url if self.type == "url" else None

    def texts(self) -> list[str]:
        return [self.data] if self.data is not None else _texts(self.content)


class _Readable(LenientBody):
    """The fields of blocks that hold text."""

    type: Kind = "text"
    text: str | None = None
    source: Source | str | None = None
    title: str | None = None
    context: str | None = None
    cache_control: Any = None
    citations: Any = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Of a block that is refused only the type stays, so that the type is what is told."""
        kind = document.get("type")
        return {"type": kind} if isinstance(kind, str) and kind in INSTEAD else document

    def _check(self, content: object) -> None:
        """Raises ValueError for a block without its text."""
        if self.type == "text" and self.text is None:
            raise ValueError("a block of type text needs text")
        source = self.source if isinstance(self.source, Source) else None
        if self.type == "document" and (source is None or not source.is_text):
            raise ValueError(
                "only documents whose source has the type text (with data) or content are read "
                "here; send the document's text"
            )
        if self.type == "image" and (source is None or source.image_url is None):
            raise ValueError(
                "an image needs a source of type base64 (with media_type and data) or url"
            )
        if self.type == "search_result" and content is None:
            raise ValueError("a search_result needs content")

    def as_image(self) -> dict[str, Any]:
        """OpenAI's form of an image."""
        url = self.source.image_url if isinstance(self.source, Source) else None
        return {"type": "image_url", "image_url": {"url": url}}

    def _read(self, content: str | list[TextBlock] | None) -> str:
        """The block as text: a document and a search result with their titles."""
        if self.type == "text":
            return self.text or ""
        texts = self.source.texts() if isinstance(self.source, Source) else _texts(content)
        origin = self.source if isinstance(self.source, str) else None
        heads = [each for each in (self.title, origin, self.context) if each]
        return "\n".join([*heads, *texts])


class ResultBlock(_Readable):
    """A block of a tool's result."""

    content: str | Texts | None = None
    tool_name: str | None = None

    @model_validator(mode="after")
    def _is_supported(self) -> ResultBlock:
        if self.type not in IN_RESULTS:
            raise _refused(self.type)
        self._check(self.content)
        return self

    def as_text(self) -> str:
        return self.tool_name or "" if self.type == "tool_reference" else self._read(self.content)


class Block(_Readable):
    """A block of a message."""

    thinking: str | None = None
    signature: Any = None  # there is nothing that it could be checked for
    data: Any = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    caller: Any = None
    tool_use_id: str | None = None
    content: str | Annotated[list[ResultBlock], Field(fail_fast=True)] | None = None
    is_error: bool | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Block:
        if not any(self.type in kinds for kinds in BLOCKS.values()):
            raise _refused(self.type)
        self._check(self.content)
        inside = self.content if isinstance(self.content, list) else ()
        if self.type == "search_result" and any(block.type != "text" for block in inside):
            raise ValueError("a search_result has blocks of type text alone")
        needed = {"thinking": "thinking", "tool_use": "name", "tool_result": "tool_use_id"}
        name = needed.get(self.type)
        if name is not None and getattr(self, name) is None:
            raise ValueError(f"a block of type {self.type} needs {name}")
        return self

    def as_text(self) -> str:
        """Of a block that holds text."""
        content = self.content
        if isinstance(content, list):
            return self._read("\n".join(block.as_text() for block in content))
        return self._read(content)

    def images(self) -> list[Part]:
        """Those of a tool's result; a chat has them in a message of the user's."""
        content = self.content if isinstance(self.content, list) else ()
        return [block.as_image() for block in content if block.type == "image"]

    def as_result(self) -> str | list[Part]:
        """A tool's result, as the content of a chat message. That it is an error is said in words
        where its text does not say so.
        """
        content = self.content
        texts: list[str] = []
        if not isinstance(content, list):
            texts = [content or ""]
        else:
            texts = [block.as_text() for block in content if block.type != "image"]
            if content and not texts:
                texts = ["The image follows."]
        if self.is_error and not any("error" in text.lower() for text in texts):
            texts = [f"Error: {texts[0]}" if texts and texts[0] else "Error", *texts[1:]]
        return _content(texts)

    def as_call(self) -> dict[str, Any]:
        return {
            "id": self.id or "",
            "type": "function",
            "function": {"name": self.name, "arguments": self.input or {}},
        }


class InputMessage(LenientBody):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Plain strings among the blocks become blocks of text."""
        content = document.get("content")
        if not isinstance(content, list) or not any(isinstance(part, str) for part in content):
            return document
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        return {**document, "content": parts}

    @model_validator(mode="after")
    def _holds_its_roles_blocks(self) -> InputMessage:
        if isinstance(self.content, str):
            return self
        wrong = next((b.type for b in self.content if b.type not in BLOCKS[self.role]), None)
        if wrong is not None:
            raise ValueError(f"a message of role {self.role} has no block of type {wrong}")
        return self

    def blocks(self) -> list[Block]:
        content = self.content
        return [_text_block(content)] if isinstance(content, str) else content


class MessageTool(LenientBody):
    """A tool of the client's own, or one that Anthropic defines, which has no schema here."""

    type: Kind = "custom"
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: Any = None  # arguments are streamed as they are generated

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The options of a tool that is left out are not told one by one."""
        if document.get("type") in (None, "custom"):
            return document
        return {name: document[name] for name in ("type", "name") if name in document}

    @model_validator(mode="after")
    def _is_complete(self) -> MessageTool:
        if self.is_own and (not self.name or self.input_schema is None):
            raise ValueError("a tool needs a name and an input_schema")
        return self

    @property
    def is_own(self) -> bool:
        return self.type == "custom"

    def as_tool(self) -> dict[str, Any]:
        """OpenAI's form, without the fields that are absent."""
        fields = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        function = {name: value for name, value in fields.items() if value is not None}
        return {"type": "function", "function": function}


class MessageToolChoice(LenientBody):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_its_tool(self) -> MessageToolChoice:
        if self.type == "tool" and not self.name:
            raise ValueError("type tool needs the name of one of the tools")
        return self


class Thinking(LenientBody):
    """Whether the model thinks before it answers. It has no budget here."""

    no_effect: ClassVar = frozenset(("budget_tokens",))

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None
    """omitted: no thinking in the answer. It is never summarized."""


class OutputFormat(LenientBody):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(LenientBody):
    effort: Effort | None = None
    format: OutputFormat | None = None


class CountTokensBody(GenerateBody):
    """The fields that decide a message's prompt, and those of its answer."""

    no_effect: ClassVar = GenerateBody.no_effect | (_NOT_CHATS - {"n", "stop"})

    messages: Annotated[list[InputMessage], Field(fail_fast=True, min_length=1)]
    system: str | Texts | None = None
    tools: Annotated[list[MessageTool], Field(fail_fast=True)] | None = None
    tool_choice: MessageToolChoice | None = None
    stop_sequences: StopStrings | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """Its place before there was an output_config."""
    cache_control: Any = None
    # Chat's own.
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Effort | None = None

    @model_validator(mode="after")
    def _has_one_answer(self) -> CountTokensBody:
        if self.n not in (None, 1):
            raise ValueError("n: a message has one answer; send the request again for another")
        return self

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of fields that were sent and have no effect."""
        names = [*super().ignored, *(f"tools.{each.type}" for each in self._left_out())]
        thinking = self.thinking
        if thinking is not None and thinking.budget_tokens is not None:
            names.append("thinking.budget_tokens")
        contents = [message.content for message in self.messages]
        blocks = (block for each in contents if not isinstance(each, str) for block in each)
        if any(block.type == "redacted_thinking" for block in blocks):
            names.append("messages.content.redacted_thinking")
        if self.chat.ignored:
            names += self.chat.ignored
        return told(names)

    @cached_property
    def chat(self) -> ChatBody:
        """The chat completion that this message is. Raises Invalid."""
        messages = list(self._chat_messages())
        continues = self._prefill(messages)
        document: dict[str, Any] = {"messages": messages, "continue_final_message": continues}
        passed = (_PASSED | {"chat_template_kwargs", "documents"}) & self.model_fields_set
        document |= {name: getattr(self, name) for name in passed}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if stop := [*(self.stop_sequences or ()), *stop]:
            document["stop"] = stop
        document |= self._chat_tools()
        document |= self._chat_reasoning()
        config = self.output_config
        wanted = (config.format if config else None) or self.output_format
        if wanted is not None and self.response_format is None:
            schema = {"name": "output", "schema": wanted.schema_}
            document["response_format"] = {"type": "json_schema", "json_schema": schema}
        return validated(document, ChatBody)

    def own_names(self, names: Sequence[str]) -> list[str]:
        """Names of chat's fields without effect as the fields that they came from."""
        sent = {}
        if self.thinking is not None:
            sent["chat_template_kwargs.enable_thinking"] = "thinking"
            sent["reasoning_effort"] = "thinking"
        if self.output_config is not None and self.output_config.effort is not None:
            sent["reasoning_effort"] = "output_config.effort"
        return [sent.get(name, name) for name in names]

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
        requests = self.chat.to_requests(
            request_id, caller, timeout_s, cache, default_model=default_model
        )
        return [replace(request, ignored=self.ignored) for request in requests]

    def _chat_messages(self) -> Iterator[dict[str, Any]]:
        """Messages of one role that follow each other are one, as in Anthropic's API."""
        system = self.system or ()
        texts = [system] if isinstance(system, str) else [block.text for block in system]
        blocks = [_text_block(text) for text in texts if not text.startswith(BILLING)]
        messages = [InputMessage(role="system", content=blocks)] if blocks else []
        for role, group in groupby([*messages, *self.messages], lambda message: message.role):
            blocks = [block for message in group for block in message.blocks()]
            yield from _answered(blocks) if role == "assistant" else _asked(role, blocks)

    def _prefill(self, messages: list[dict[str, Any]]) -> bool:
        """Whether the answer continues the last message, an assistant's; an empty one is removed.
        Raises Invalid.
        """
        last = messages[-1]
        if last["role"] != "assistant":
            return False
        if last.get("tool_calls"):
            raise Invalid(
                "The last message calls tools; send their results after it, as tool_result in a "
                "message of role user.",
                param="messages",
            )
        if last["content"].strip() or len(messages) == 1:
            return True
        messages.pop()
        return False

    def _left_out(self) -> list[MessageTool]:
        """Tools that Anthropic or its server would run."""
        return [tool for tool in self.tools or () if not tool.is_own]

    def _chat_tools(self) -> dict[str, Any]:
        """Raises Invalid for a forced call of a tool that is left out."""
        tools = [tool.as_tool() for tool in self.tools or () if tool.is_own]
        document: dict[str, Any] = {"tools": tools} if tools else {}
        choice, left_out = self.tool_choice, self._left_out()
        if choice is None:
            return document
        names = {tool.name for tool in left_out}
        if (choice.type == "tool" and choice.name in names) or (
            choice.type == "any" and left_out and not tools
        ):
            raise Invalid(
                "tool_choice forces a call of a tool that Anthropic defines, which this server "
                "does not have; send it as a tool with an input_schema, or let tool_choice be "
                "auto.",
                param="tool_choice",
            )
        kinds = {"auto": "auto", "any": "required", "none": "none"}
        named = {"type": "function", "function": {"name": choice.name}}
        document["tool_choice"] = kinds.get(choice.type, named)
        if choice.disable_parallel_tool_use:
            document["parallel_tool_calls"] = False
        return document

    def _chat_reasoning(self) -> dict[str, Any]:
        """Without `thinking` it is the model's habit, as in a chat."""
        document: dict[str, Any] = {}
        effort = self.reasoning_effort
        if self.output_config is not None and self.output_config.effort is not None:
            effort = self.output_config.effort
        thinking = self.thinking
        if thinking is not None and thinking.type == "disabled":
            effort = "none"
        elif thinking is not None and effort is None:
            variables = self.chat_template_kwargs or {}
            document["chat_template_kwargs"] = {"enable_thinking": True, **variables}
        if effort is not None:
            document["reasoning_effort"] = effort
        is_omitted = thinking is not None and thinking.display == "omitted"
        if self.include_reasoning is False or is_omitted:
            document["include_reasoning"] = False
        return document


class MessagesBody(CountTokensBody):
    """POST /v1/messages."""

    max_tokens: int | None = Field(ge=-1, le=INT64_MAX)
    """Required, as in Anthropic's API; -1: as many as fit in the context."""


def _asked(role: str, blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    """A turn of the user's or the system's: tools' results are messages of their own."""
    parts: list[Part] = []
    images: list[Part] = []  # of results so far: they come after the last of these
    is_empty = True
    for block in blocks:
        if block.type != "tool_result":
            parts += [*images, block.as_image() if block.type == "image" else block.as_text()]
            images = []
            continue
        if parts:
            yield {"role": role, "content": _content(parts)}
            parts = []
        yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.as_result()}
        images += block.images()
        is_empty = False
    parts += images
    if parts or is_empty:
        yield {"role": role, "content": _content(parts)}


def _answered(blocks: Sequence[Block]) -> Iterator[dict[str, Any]]:
    """A turn of the assistant's."""
    content = "".join(block.as_text() for block in blocks if block.type == "text")
    message: dict[str, Any] = {"role": "assistant", "content": content}
    thinking = [block.thinking for block in blocks if block.thinking]
    if thinking:
        message["reasoning"] = "\n".join(thinking)
    calls = [block.as_call() for block in blocks if block.type == "tool_use"]
    if calls:
        message["tool_calls"] = calls
        if not content:
            del message["content"]
    yield message


def _text_block(text: str) -> Block:
    return Block.model_construct({"type", "text"}, type="text", text=text)  # needs no validation


def _content(parts: Sequence[Part]) -> str | list[Part]:
    """The content of a chat message; several texts are several parts."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts] or ""


def _texts(content: str | list[TextBlock] | None) -> list[str]:
    if isinstance(content, list):
        return [block.text for block in content]
    return [content or ""]


async def count_tokens(pipeline: Pipeline, body: CountTokensBody, context: CallContext) -> int:
    """The tokens of the prompt that the message would have. Raises ServeError."""
    (request,) = requests_of(pipeline, body, context)
    engine = pipeline.models.of(request.model, context.caller).engine
    return len(await engine.tokenize(request))
