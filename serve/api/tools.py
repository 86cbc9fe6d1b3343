"""Tools that a chat request offers, and calls of them in its messages."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from packhorse.serve.api.validation import LenientBody
from packhorse.serve.errors import Invalid

ToolName = Annotated[str, Field(min_length=1, max_length=256)]


class ToolCallFunction(LenientBody):
    name: str
    arguments: str = "{}"

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """Arguments that are an object, as some clients keep them, become JSON text."""
        if not isinstance(document.get("arguments"), dict):
            return document
        try:
            arguments = json.dumps(document["arguments"], ensure_ascii=False)
        except RecursionError as error:
            raise Invalid("The arguments of a tool call are nested too deeply.") from error
        return {**document, "arguments": arguments}


class ToolCall(LenientBody):
    index: int | None = None
    """Left over from streamed pieces by some clients; it has no effect."""
    id: str = ""
    type: Literal["function"] = "function"
    function: ToolCallFunction


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


Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=128)]
RequestedToolChoice = Literal["none", "auto", "required"] | NamedTool
