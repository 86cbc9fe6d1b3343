"""Tools that a response may call: functions, custom tools with free text, and namespaces of both.

The model is offered functions alone. A custom tool becomes a function with one string argument,
`input`; a tool of a namespace gets a name that has the namespace before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from packhorse.serve.api.tools import ToolName
from packhorse.serve.api.validation import LenientBody
from packhorse.serve.errors import Invalid

OFFERED = ("function", "custom", "namespace")
INPUT_SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
_BEGINNING = re.compile(r'\s*\{\s*"input"\s*:\s*"')


def flat_name(namespace: str | None, name: str) -> str:
    """What the model calls a tool."""
    return f"{namespace}__{name}" if namespace else name


class ToolFormat(LenientBody):
    """Of a custom tool's input. A grammar is told to the model and not enforced."""

    type: Literal["text", "grammar"] = "text"
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None

    @model_validator(mode="after")
    def _has_its_grammar(self) -> ToolFormat:
        if self.type == "grammar" and (self.syntax is None or self.definition is None):
            raise ValueError("a grammar has a syntax, lark or regex, and a definition")
        return self


class ResponseTool(LenientBody):
    """A tool of any type. Hosted tools, which run at OpenAI, have no effect here."""

    type: str = Field("function", max_length=64)
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: ToolFormat | None = None
    tools: Annotated[list[ResponseTool], Field(fail_fast=True, max_length=128)] | None = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Chat's nested form becomes flat; the fields of a hosted tool are its own matter."""
        kind = document.get("type", "function")
        if isinstance(kind, str) and kind not in OFFERED:
            return {"type": kind}
        nested = document.get("function")
        if kind == "function" and isinstance(nested, dict):
            return {**{k: v for k, v in document.items() if k != "function"}, **nested}
        return document

    @model_validator(mode="after")
    def _has_a_name(self) -> ResponseTool:
        if self.type in OFFERED and self.name is None:
            raise ValueError(f"a tool of type {self.type} needs a name")
        return self

    @property
    def is_hosted(self) -> bool:
        return self.type not in OFFERED

    def as_document(self) -> dict[str, Any]:
        """The tool as answers repeat it."""
        document: dict[str, Any] = {"type": self.type, "name": self.name}
        if self.type == "function":
            return {
                **document,
                "description": self.description,
                "parameters": self.parameters,
                "strict": self.strict,
            }
        if self.type == "namespace":
            inner = [tool.as_document() for tool in self.tools or () if not tool.is_hosted]
            return {**document, "description": self.description or "", "tools": inner}
        if self.description is not None:
            document["description"] = self.description
        if self.format is not None:
            document["format"] = self.format.model_dump(exclude_none=True)
        return document


ResponseTools = Annotated[list[ResponseTool], Field(fail_fast=True, max_length=128)]


class AllowedTool(LenientBody):
    type: str = Field("function", max_length=64)
    name: ToolName | None = None
    namespace: ToolName | None = None


class ToolChoiceObject(LenientBody):
    """One tool that must be called, or a list of those that may be."""

    type: str = Field("function", max_length=64)
    name: ToolName | None = None
    namespace: ToolName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[AllowedTool], Field(fail_fast=True, max_length=128)] | None = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Chat's forms: `{"type": "function", "function": {"name"}}`, and allowed_tools nested."""
        for name in ("function", "allowed_tools", "custom"):
            nested = document.get(name)
            if document.get("type") == name and isinstance(nested, dict):
                return {**{k: v for k, v in document.items() if k != name}, **nested}
        return document

    def as_document(self) -> dict[str, Any]:
        """The choice as answers repeat it."""
        if self.type != "allowed_tools":
            return {"type": self.type, "name": self.name}
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        return {"type": self.type, "mode": self.mode or "auto", "tools": tools}


ResponseToolChoice = Literal["none", "auto", "required"] | ToolChoiceObject


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """One tool as the model sees it (`function`), and what a call of it is in the answer."""

    kind: str
    name: str
    namespace: str | None
    function: dict[str, Any]

    @property
    def flat(self) -> str:
        return flat_name(self.namespace, self.name)


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What of a request's tools and choice concerns the model."""

    offered: tuple[OfferedTool, ...]
    choice: str | dict[str, Any] | None
    """Chat's tool_choice."""
    ignored: tuple[str, ...]
    """Names of tools, or of their fields, without effect."""

    @property
    def is_forced(self) -> bool:
        return self.choice not in (None, "auto", "none")


def plan_tools(
    tools: Sequence[ResponseTool] | None, choice: str | ToolChoiceObject | None
) -> ToolPlan:
    """Raises Invalid for a choice that the tools cannot meet."""
    ignored: list[str] = []
    offered: list[OfferedTool] = []
    for tool in tools or ():
        if tool.is_hosted:
            ignored.append(f"tools.{tool.type}")
        elif tool.type == "namespace":
            for inner in tool.tools or ():
                if inner.type not in ("function", "custom"):
                    ignored.append(f"tools.{inner.type}")
                    continue
                offered.append(_offered(inner, tool, ignored))
        else:
            offered.append(_offered(tool, None, ignored))
    return _chosen(offered, choice, ignored)


def _offered(tool: ResponseTool, namespace: ResponseTool | None, ignored: list[str]) -> OfferedTool:
    around = namespace.name if namespace else None
    about, parameters, strict = tool.description, tool.parameters, tool.strict
    if tool.type == "custom":
        parameters, strict = INPUT_SCHEMA, None
        form = tool.format
        if form is not None and form.type == "grammar":
            ignored.append("tools.format")
            grammar = f"The input follows this {form.syntax} grammar:\n{form.definition}"
            about = f"{about}\n\n{grammar}" if about else grammar
    function: dict[str, Any] = {"name": flat_name(around, tool.name or "")}
    if about is not None:
        function["description"] = about
    if parameters is not None:
        function["parameters"] = parameters
    if strict is not None:
        function["strict"] = strict
    return OfferedTool(tool.type, tool.name or "", around, function)


def _chosen(
    offered: list[OfferedTool], choice: str | ToolChoiceObject | None, ignored: list[str]
) -> ToolPlan:
    chat_choice: str | dict[str, Any] | None
    if isinstance(choice, ToolChoiceObject) and choice.type == "allowed_tools":
        allowed = {flat_name(tool.namespace, tool.name or "") for tool in choice.tools or ()}
        names = {tool.flat for tool in offered}
        unknown = [
            tool
            for tool in choice.tools or ()
            if tool.type in OFFERED and flat_name(tool.namespace, tool.name or "") not in names
        ]
        if unknown:
            raise _no_such_tool()
        offered = [tool for tool in offered if tool.flat in allowed]
        chat_choice = choice.mode or "auto"
    elif isinstance(choice, ToolChoiceObject):
        if choice.type not in ("function", "custom"):
            raise Invalid(
                f"tool_choice: a hosted tool ({choice.type[:40]!r}) cannot be forced, as none runs "
                "here; send tool_choice 'auto', or a function.",
                param="tool_choice",
            )
        flat = flat_name(choice.namespace, choice.name or "")
        matching = [tool.flat for tool in offered if flat in (tool.flat, tool.name)]
        if not matching:
            raise _no_such_tool()
        chat_choice = {"type": "function", "function": {"name": matching[0]}}
    else:
        chat_choice = choice
    if not offered:
        if chat_choice == "required":
            raise Invalid(
                "tool_choice 'required' needs a function or a custom tool: hosted tools do not "
                "run here.",
                param="tool_choice",
            )
        chat_choice = None
    return ToolPlan(tuple(offered), chat_choice, tuple(ignored))


def _no_such_tool() -> Invalid:
    return Invalid("tool_choice names a tool that is not among tools.", param="tool_choice")


def custom_input(arguments: str) -> str:
    """The free text that a call's arguments hold. Of arguments that were cut off: what there is;
    of some that are not in that form: all of it.
    """
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return _cut_input(arguments)
    if isinstance(found, dict) and isinstance(found.get("input"), str):
        return str(found["input"])
    return arguments


def _cut_input(arguments: str) -> str:
    beginning = _BEGINNING.match(arguments)
    if beginning is None:
        return arguments
    rest = arguments[beginning.end() :]
    for cut in range(min(12, len(rest)) + 1):  # an escape, of a surrogate pair at most, is cut off
        try:
            return str(json.loads(f'"{rest[: len(rest) - cut]}"', strict=False))
        except ValueError:
            continue
    return rest
