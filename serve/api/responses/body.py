"""The body of POST /v1/responses, and the chat request that it stands for.

Chat's own checks, sampling, tools, constraints and cache key are the only ones: the same request as
chat and as a response generates the same tokens, and shares kept results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from packhorse.serve.api.chat import ChatBody, Effort
from packhorse.serve.api.fields import (
    INT32_MAX,
    INT64_MAX,
    GenerateBody,
    JsonSchema,
    ResponseFormat,
)
from packhorse.serve.api.responses.items import WORDLESS, InputItem, messages_of
from packhorse.serve.api.responses.tools import (
    ResponseToolChoice,
    ResponseTools,
    ToolPlan,
    plan_tools,
)
from packhorse.serve.api.validation import LenientBody, Unsupported, invalid_from
from packhorse.serve.errors import Invalid
from packhorse.serve.ignored import told

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16
# Chat's names of what has another one here, for errors and for what is told as ignored.
NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
}
# Fields of GenerateBody that have another form here, or no place in the answer.
_ELSEWHERE = frozenset((
    "n", "max_tokens", "response_format", "prompt_logprobs", "return_token_ids",
    "return_tokens_as_token_ids", "user", "metadata", "store", "service_tier",
    "safety_identifier", "prompt_cache_key",
))  # fmt: skip
_PASSED = (
    *(name for name in GenerateBody.model_fields if name not in _ELSEWHERE),
    "parallel_tool_calls", "include_reasoning", "chat_template_kwargs", "documents",
    "add_generation_prompt", "continue_final_message",
)  # fmt: skip


class TextFormat(LenientBody):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = Field("response", max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Chat's form, with a `json_schema` of its own, becomes flat."""
        nested = document.get("json_schema")
        if not isinstance(nested, dict):
            return document
        return {**{k: v for k, v in document.items() if k != "json_schema"}, **nested}

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("type 'json_schema' comes with a schema")
        return self

    def as_document(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "schema": self.schema_,
            "strict": self.strict,
        }

    def as_response_format(self) -> ResponseFormat | None:
        """Chat's form; None: plain text."""
        if self.type == "text":
            return None
        if self.schema_ is None or self.type == "json_object":
            return ResponseFormat(type="json_object")
        schema = JsonSchema(name=self.name, schema=self.schema_, strict=self.strict)
        return ResponseFormat(type="json_schema", json_schema=schema)


class TextConfig(LenientBody):
    format: TextFormat | None = None
    verbosity: Any = None


class ReasoningConfig(LenientBody):
    effort: Effort | None = None
    summary: Any = None
    generate_summary: Any = None


class ResponseBody(GenerateBody):
    """POST /v1/responses."""

    unsupported: ClassVar = {
        **GenerateBody.unsupported,
        "conversation": Unsupported((), "send previous_response_id, or the items as input"),
        "prompt": Unsupported((), "send the template's text as instructions and input"),
        "max_completion_tokens": Unsupported((), "send max_output_tokens"),
        "messages": Unsupported(([],), "send them as input"),
        "previous_input_messages": Unsupported(([],), "send them as input"),
    }
    no_effect: ClassVar = frozenset((
        "user", "service_tier", "safety_identifier", "prompt_cache_key", "max_tool_calls",
        "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids",
    ))  # fmt: skip

    input: str | Annotated[list[InputItem], Field(fail_fast=True)] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=-1, le=INT64_MAX)
    max_tool_calls: int | None = None
    tools: ResponseTools | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: Annotated[list[str], Field(fail_fast=True, max_length=64)] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=INT32_MAX)
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = Field(None, max_length=256)
    background: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    include_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @field_validator("metadata")
    @classmethod
    def _is_small(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is None:
            return None
        if len(value) > MAX_METADATA:
            raise ValueError(f"{len(value)} pairs are above the limit of {MAX_METADATA}")
        if any(len(name) > 64 or len(text) > 512 for name, text in value.items()):
            raise ValueError("names have at most 64 characters, values at most 512")
        return value

    @model_validator(mode="after")
    def _has_this_apis_fields(self) -> ResponseBody:
        if self.n not in (None, 1):
            raise ValueError(f"n={self.n}: a response has one answer; send the request n times")
        if self.max_tokens is not None:
            raise ValueError("max_tokens is chat's name; send max_output_tokens")
        if self.response_format is not None:
            raise ValueError("response_format is chat's name; send text.format")
        if self.background and self.store is False:
            raise ValueError(
                "background needs store: the answer could not be fetched; leave store out"
            )
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def runs_in_background(self) -> bool:
        """A stream is answered while it is read."""
        return bool(self.background) and not self.stream

    def ignored_with(self, plan: ToolPlan) -> tuple[str, ...]:
        """Names of what was sent and has no effect."""
        names = [*super().ignored, *plan.ignored]
        if isinstance(self.input, list):
            names += [f"input.{item.type}" for item in self.input if item.type in WORDLESS]
        others = [name for name in self.include or () if name != LOGPROBS]
        names += [f"include.{name}" for name in others]
        if self.top_logprobs and not self.wants_logprobs:
            names.append("top_logprobs")
        if self.text is not None:
            if self.text.verbosity is not None:
                names.append("text.verbosity")
            if plan.is_forced and self.text.format is not None and self.text.format.type != "text":
                names.append("text.format")  # constrains text, and there will be none
        if self.reasoning is not None:
            for name in ("summary", "generate_summary"):
                if getattr(self.reasoning, name) is not None:
                    names.append(f"reasoning.{name}")
        if self.background and self.stream:
            names.append("background")
        return told(names) if names else ()

    def plan(self) -> ToolPlan:
        """What of the tools concerns the model. Raises Invalid."""
        return plan_tools(self.tools, self.tool_choice)

    def to_chat(
        self, items: Sequence[InputItem], plan: ToolPlan, more_ignored: Iterable[str] = ()
    ) -> ChatBody:
        """The chat request with these items as its conversation. Raises Invalid."""
        sent = self.model_fields_set
        fields: dict[str, Any] = {
            name: value
            for name in _PASSED
            if name in sent and (value := getattr(self, name)) is not None
        }
        messages = messages_of(items, self.instructions)
        if not messages:
            raise Invalid("input: send text or at least one item.", param="input")
        fields["messages"] = messages
        if self.max_output_tokens is not None:
            fields["max_completion_tokens"] = self.max_output_tokens
        if plan.offered:
            fields["tools"] = [
                {"type": "function", "function": tool.function} for tool in plan.offered
            ]
        if plan.choice is not None:
            fields["tool_choice"] = plan.choice
        if self.text is not None and self.text.format is not None and not plan.is_forced:
            fields["response_format"] = self.text.format.as_response_format()
        if self.reasoning is not None and self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.wants_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        try:
            chat = ChatBody(**fields)
        except ValidationError as error:
            raise renamed(invalid_from(error)) from error
        ignored = told((*self.ignored_with(plan), *more_ignored))
        object.__setattr__(chat, "dropped", ignored)
        return chat


def renamed(error: Invalid) -> Invalid:
    """An error of chat's with this API's names of the fields."""
    place, dot, rest = (error.param or "").partition(".")
    name = NAMES.get(place)
    if name is None:
        return error
    message = error.message
    if message.startswith(place):
        message = name + message[len(place) :]
    return Invalid(message, param=name + dot + rest, code=error.openai_code)
