"""Chat as vLLM's own server does it: messages become a prompt, the answer's text becomes reasoning,
content and tool calls.

Rendering goes through vLLM's renderer, parsing through its parser classes. The parsers take vLLM's
own request object, which is built only for requests with tools or on a server with a reasoning
parser.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jinja2.meta
import jinja2.sandbox
import msgspec
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionToolsParam,
)
from vllm.exceptions import VLLMClientError
from vllm.parser import ParserManager
from vllm.renderers.chat_utils import load_chat_template, make_tool_call_id
from vllm.renderers.hf import AssistantTracker, HfRenderer, resolve_chat_template
from vllm.renderers.params import ChatParams, merge_kwargs
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from packhorse.serve.engines.images import ImageLoader, LoadedImage, image_url_of, image_urls
from packhorse.serve.engines.vllm.constraints import check_integers, check_tools
from packhorse.serve.engines.vllm.sampling import invalid
from packhorse.serve.errors import Invalid, StartupError
from packhorse.serve.messages import ChatOptions, Chunk, GenerateRequest, ToolCall
from packhorse.serve.settings.engine import EngineSettings

# Template variables that other fields of a request, or the tokenizer, decide.
OURS = frozenset(("messages", "tools", "add_generation_prompt", "bos_token", "eos_token"))
PATHS = ("vocab_file", "merges_file", "tokenizer_file", "name_or_path")
# Functions of a template whose result changes from call to call.
CHANGING = ("strftime_now", "lipsum", "| random", "|random")


def template_of(settings: EngineSettings) -> str | None:
    """The chat template that the settings name. Raises StartupError when it cannot be found."""
    try:
        template: str | None = load_chat_template(settings.chat_template)
    except (ValueError, VLLMClientError) as error:
        raise StartupError(f"engine.chat_template: {invalid(error).message}") from error
    return template


@lru_cache
def template_variables(template: str) -> frozenset[str]:
    """The variables that a chat template uses and does not set itself. As vLLM finds those that it
    passes on.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[AssistantTracker, "jinja2.ext.loopcontrols"],
    )
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))


def parser_class(
    settings: EngineSettings, *, is_harmony: bool = False, tokenizer: Any = None
) -> Any:
    """vLLM's parser for the settings, or None. Without a tokenizer only the names are checked,
    which takes no engine. Raises StartupError.
    """
    try:
        return ParserManager.get_parser(
            tool_parser_name=settings.tool_call_parser,
            reasoning_parser_name=settings.reasoning_parser,
            enable_auto_tools=settings.tool_call_parser is not None,
            is_harmony=is_harmony,
            tokenizer=tokenizer,
        )
    except TypeError as error:
        raise StartupError(f"{error} (--tool-call-parser, --reasoning-parser).") from error


class Chat:
    """The chat template and the parsers of one engine."""

    def __init__(self, llm: AsyncLLM, settings: EngineSettings) -> None:
        """Raises StartupError for a parser that vLLM does not have or the tokenizer cannot feed."""
        self._llm = llm
        self._template = template_of(settings)
        self._defaults = dict(settings.default_chat_template_kwargs)
        self._is_lasting: dict[bool, bool] = {}  # with tools, without
        self._images = ImageLoader(settings.images) if reads_images(llm) else None
        self._parser_class = parser_class(
            settings,
            is_harmony=llm.model_config.hf_config.model_type == "gpt_oss",
            tokenizer=llm.renderer.tokenizer,
        )
        self._parses_tools = bool(self._parser_class and self._parser_class.tool_parser_cls)
        self._parses_reasoning = bool(
            self._parser_class and self._parser_class.reasoning_parser_cls
        )

    def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's configuration without paths, its class, and the chat template."""
        tokenizer = self._llm.renderer.get_tokenizer()
        given: dict[str, Any] = getattr(tokenizer, "init_kwargs", None) or {}
        told = {name: _plain(value) for name, value in given.items() if name not in PATHS}
        template = self._resolved(ChatOptions())
        return {
            **told,
            "tokenizer_class": type(tokenizer).__name__,
            **({"chat_template": template} if template else {}),
        }

    @asynccontextmanager
    async def loaded_images(self, request: GenerateRequest) -> AsyncIterator[list[LoadedImage]]:
        """The images of the request's messages, decoded, as long as the context lasts. Raises
        Invalid.
        """
        urls = image_urls(request.messages or ())
        if not urls:
            yield []
            return
        if self._images is None:
            raise Invalid(
                "This model reads text alone, and the conversation has images; send it to a "
                "vision-language model, or describe them in words.",
                param="messages",
            )
        if request.truncate_prompt_tokens is not None:
            raise Invalid(
                "truncate_prompt_tokens could cut an image in two; leave it out, or leave out "
                "the images.",
                param="truncate_prompt_tokens",
            )
        async with self._images.loaded(urls) as images:
            yield images

    def is_lasting(self, request: GenerateRequest) -> bool:
        """Whether the same messages always become the same prompt: the template reads no clock, and
        no image comes from elsewhere.
        """
        if self._images is not None and any(
            not url.startswith("data:") for url in image_urls(request.messages or ())
        ):
            return False
        with_tools = bool(request.chat.tools)  # there may be a template of their own
        if with_tools not in self._is_lasting:
            # Other renderers write the date in code of their own.
            lasting = isinstance(self._llm.renderer, HfRenderer)
            template = self._resolved(request.chat) if lasting else None
            self._is_lasting[with_tools] = template is not None and not any(
                name in template for name in CHANGING
            )
        return self._is_lasting[with_tools]

    def _resolved(self, options: ChatOptions) -> str | None:
        template: str | None = resolve_chat_template(
            self._llm.renderer.get_tokenizer(),
            chat_template=self._template,
            tools=list(options.tools) or None,
            model_config=self._llm.model_config,
        )
        return template

    def params(self, request: GenerateRequest) -> tuple[ChatParams, tuple[str, ...]]:
        """The renderer's parameters, and the request's fields that this template does not use.
        Raises Invalid for documents that it would leave out.
        """
        options = request.chat
        ignored = self._ignored(options)
        if ignored:
            known = {
                name: value
                for name, value in options.template_variables.items()
                if f"chat_template_kwargs.{name}" not in ignored
            }
            effort = None if "reasoning_effort" in ignored else options.reasoning_effort
            options = replace(options, template_variables=known, reasoning_effort=effort)
        check_integers(dict(options.template_variables), param="chat_template_kwargs")
        variables: dict[str, Any] = {
            "add_generation_prompt": options.add_generation_prompt,
            "continue_final_message": options.continue_final_message,
            "documents": list(options.documents) or None,
            "reasoning_effort": options.reasoning_effort,
        }
        if options.reasoning_effort and "enable_thinking" not in options.template_variables:
            variables["enable_thinking"] = options.reasoning_effort != "none"
        # Through vLLM's class, which writes out absent fields: templates print them.
        tools = [ChatCompletionToolsParam(**tool).model_dump() for tool in options.tools] or None
        params = ChatParams(
            chat_template=self._template,
            chat_template_kwargs=merge_kwargs(dict(options.template_variables), variables),
        ).with_defaults({**self._defaults, "tools": tools, "tokenize": False})
        return params, ignored

    def _ignored(self, options: ChatOptions) -> tuple[str, ...]:
        """Variables that the template does not use, or that are not the caller's to set. Raises
        Invalid.
        """
        asked = set(options.template_variables)
        if not (asked or options.reasoning_effort or options.documents):
            return ()
        known = set(template_variables(self._resolved(options) or ""))
        if (options.documents or "documents" in asked) and "documents" not in known:
            raise Invalid(
                "The model's chat template has no place for documents, and would answer without "
                "them; put their text into a message.",
                param="documents",
            )
        ignored = [f"chat_template_kwargs.{name}" for name in sorted(asked - known | asked & OURS)]
        # For a template that has `enable_thinking`, effort becomes that, see `params`.
        if options.reasoning_effort and not known & {"reasoning_effort", "enable_thinking"}:
            ignored.append("reasoning_effort")
        return tuple(ignored)

    def reader(
        self,
        request: GenerateRequest,
        structured: StructuredOutputsParams | None,
        params: ChatParams,
        prompt_token_ids: list[int],
    ) -> AnswerReader | None:
        """The reader of the answer, or None when the answer is plain text. Raises Invalid."""
        options = request.chat
        calls = options.tool_choice != "none"
        if calls and not self._parses_tools:
            raise Invalid(
                f"tool_choice={options.tool_choice!r} needs a server that was started with "
                "--tool-call-parser (hermes, for instance); with tool_choice='none' the model sees "
                "the tools and answers in plain text.",
                param="tool_choice",
            )
        if not calls and not self._parses_reasoning:
            return None
        check_tools(options.tools)
        try:
            return AnswerReader(self, request, structured, params, prompt_token_ids)
        except (ValidationError, VLLMClientError, ValueError, TypeError) as error:
            raise invalid(error, "tools" if options.tools else "messages") from error

    def make_parser(self, request: ChatCompletionRequest, params: ChatParams) -> Any:
        """A parser of vLLM's; it has state, so one for each choice."""
        assert self._parser_class is not None
        return self._parser_class(
            self._llm.renderer.get_tokenizer(),
            request.tools,
            chat_template_kwargs=params.chat_template_kwargs,
            model_config=self._llm.model_config,
        )


def reads_images(llm: AsyncLLM) -> bool:
    """Whether the model takes images."""
    processor = getattr(llm.renderer, "mm_processor", None)
    return processor is not None and "image" in processor.info.supported_mm_limits


def with_pictures(
    messages: Iterable[dict[str, Any]], images: Sequence[LoadedImage]
) -> list[dict[str, Any]]:
    """The messages as vLLM's renderer takes them, with a decoded picture for each image, in
    order.
    """
    if not images:
        return list(messages)
    pictures = iter(images)
    shown = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                part
                if image_url_of(part) is None
                else {"type": "image_pil", "image_pil": next(pictures).picture}
                for part in content
            ]
            message = {**message, "content": parts}
        shown.append(message)
    return shown


def _plain(value: Any) -> Any:
    """The value as JSON; a token as its text."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "content", None) or str(value)


class AnswerReader:
    """Reads the reasoning and the tool calls out of one request's answer.

    `structured` is what constrains the answer: for tool calls, vLLM's parser changes it.
    """

    def __init__(
        self,
        chat: Chat,
        request: GenerateRequest,
        structured: StructuredOutputsParams | None,
        params: ChatParams,
        prompt_token_ids: list[int],
    ) -> None:
        options = request.chat
        self._options = options
        self._prompt_token_ids = prompt_token_ids
        self._request = _vllm_request(request, structured)
        first = chat.make_parser(self._request, params)
        self._parsers = {0: first}
        self._chat, self._params = chat, params
        if first.always_adjust_request or first.reasoning_parser or options.tool_choice != "none":
            self._request = first.adjust_request(self._request)
        self.structured = self._request.extract_structured_outputs()
        self.skip_special_tokens: bool = self._request.skip_special_tokens
        self.reasoning_ended = self._request.resolve_reasoning_ended(first, prompt_token_ids)
        self.reasoning_kwargs = (
            {"chat_template_kwargs": params.chat_template_kwargs}
            if first.reasoning_parser
            else None
        )
        self._called = [False] * request.sampling.n
        self._token_ids: list[list[int]] = [[] for _ in range(request.sampling.n)]
        self._num_sent = [0] * request.sampling.n

    def piece(self, chunk: Chunk) -> Chunk | None:
        """A streamed chunk, parsed; None when the parser holds it back: its tokens then come with
        the next chunk.
        """
        parser = self._parser(chunk.index)
        finished = chunk.finish_reason is not None
        delta = parser.parse_delta(
            chunk.text,
            list(chunk.token_ids),
            self._request,
            self._prompt_token_ids,
            finished=finished,
        )
        self._token_ids[chunk.index].extend(chunk.token_ids)
        calls = tuple(
            ToolCall(
                call.index,
                (call.function.arguments if call.function else None) or "",
                call.id,
                call.function.name if call.function else None,
            )
            for call in (delta.tool_calls if delta else None) or ()
            if self._options.parallel_tool_calls or call.index == 0
        )
        self._called[chunk.index] |= bool(calls)
        if delta is None and not finished and chunk.logprobs is None:
            return None
        token_ids = self._token_ids[chunk.index][self._num_sent[chunk.index] :]
        self._num_sent[chunk.index] += len(token_ids)
        reason = chunk.finish_reason
        named = self._options.tool_choice == "named"
        if self._called[chunk.index] and reason == "stop" and not named:
            reason = "tool_calls"
        return msgspec.structs.replace(
            chunk,
            token_ids=token_ids,
            text=(delta.content if delta else None) or "",
            reasoning=delta.reasoning if delta else None,
            tool_calls=calls,
            finish_reason=reason,
            logprobs=chunk.logprobs if self._options.include_reasoning else None,
            reasoning_tokens=self._count(chunk.index) if finished else 0,
        )

    def whole(self, chunk: Chunk) -> Chunk:
        """A whole answer, parsed."""
        parser = self._parser(chunk.index)
        parser.set_prompt_token_ids(self._prompt_token_ids)
        reasoning, content, calls = parser.parse(
            chunk.text,
            self._request,
            enable_auto_tools=parser.tool_parser_cls is not None,
            model_output_token_ids=chunk.token_ids,
        )
        self._token_ids[chunk.index].extend(chunk.token_ids)
        choice = self._options.tool_choice
        calls = [] if choice == "none" else list(calls or ())
        if not self._options.parallel_tool_calls:
            calls = calls[:1]
        reason = chunk.finish_reason
        if (choice == "auto" and calls) or (choice == "required" and reason == "stop"):
            reason = "tool_calls"
        return msgspec.structs.replace(
            chunk,
            text=content or "",
            reasoning=reasoning if self._options.include_reasoning else None,
            tool_calls=tuple(
                ToolCall(number, call.arguments, call.id or make_tool_call_id(), call.name)
                for number, call in enumerate(calls)
            ),
            finish_reason=reason,
            logprobs=chunk.logprobs if self._options.include_reasoning else None,
            reasoning_tokens=self._count(chunk.index),
        )

    def _parser(self, index: int) -> Any:
        """The choice's parser, made at its first chunk: a hundred at once would block the event
        loop.
        """
        if index not in self._parsers:
            self._parsers[index] = self._chat.make_parser(self._request, self._params)
        return self._parsers[index]

    def _count(self, index: int) -> int:
        counted: int = self._parsers[index].count_reasoning_tokens(tuple(self._token_ids[index]))
        return counted


def _vllm_request(
    request: GenerateRequest, structured: StructuredOutputsParams | None
) -> ChatCompletionRequest:
    """vLLM's own request object, with the fields that its parsers read."""
    options = request.chat
    choice: Any = options.tool_choice
    if choice == "named":
        choice = {"type": "function", "function": {"name": options.named_tool}}
    made = ChatCompletionRequest(
        model=request.model,
        messages=[dict(message) for message in request.messages or ()],
        tools=_tools_of(options) or None,
        tool_choice=choice,
        parallel_tool_calls=options.parallel_tool_calls,
        include_reasoning=options.include_reasoning,
        skip_special_tokens=request.sampling.skip_special_tokens,
        stream=request.stream,
        n=request.sampling.n,
    )
    made.structured_outputs = structured
    return made


def _tools_of(options: ChatOptions) -> list[dict[str, Any]]:
    """The tools. Arguments of a forced call follow the schema whatever `strict` says: vLLM would
    leave them free, and a small model then writes text until max_tokens.
    """
    tools = [dict(tool) for tool in options.tools]
    if options.tool_choice not in ("required", "named"):
        return tools
    return [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]
