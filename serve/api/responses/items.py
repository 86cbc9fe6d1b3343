"""Items of a conversation in OpenAI's Responses API: read, kept, and made into messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from packhorse.serve.api.responses.tools import flat_name
from packhorse.serve.api.validation import LenientBody
from packhorse.serve.errors import Invalid

# Types of parts that hold text, and the field that holds it.
TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
}
INSTEAD = {
    "input_file": "send its text as input_text",
    "input_audio": "send its transcript as input_text",
}
# What hosted tools of other servers left in a history without a word for the model.
WORDLESS = frozenset((
    "web_search_call", "file_search_call", "image_generation_call", "mcp_list_tools",
))  # fmt: skip
CALLS = ("function_call", "custom_tool_call")
OUTPUTS = ("function_call_output", "custom_tool_call_output")
KNOWN = frozenset(("message", "reasoning", "item_reference", *CALLS, *OUTPUTS))
PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "function_call_output": "fco",
    "custom_tool_call_output": "cto",
}
OWN_ID = re.compile(r"(?:msg|rs|fc|ctc|fco|cto)_([0-9a-f]{32})_i?[0-9]{1,9}")
"""Ids of items that this server has made: which response they belong to."""


class Part(LenientBody):
    """A part of an item's content: text, or an image by its URL."""

    type: str = Field("input_text", max_length=64)
    text: str | None = None
    image_url: str | None = None
    # From answers that clients send back; without effect.
    annotations: Any = None
    logprobs: Any = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The text of every type is in `text`; an image may come in chat's form. Raises Invalid for
        another type.
        """
        kind = document.get("type") or "input_text"
        if kind in ("input_image", "image_url"):
            url = document.get("image_url")
            if isinstance(url, dict):
                url = url.get("url")
            if url is None:
                raise Invalid(
                    "An input_image needs an image_url here: a data URL, or one of a host that "
                    "this server may ask; files by their id are not read.",
                    param="input",
                )
            kept = {name: value for name, value in document.items() if name != "detail"}
            return {**kept, "type": "input_image", "image_url": url}
        name = TEXTS.get(kind) if isinstance(kind, str) else None
        if name is None:
            shown = kind if isinstance(kind, str) and re.fullmatch(r"\w{1,64}", kind) else "other"
            instead = INSTEAD.get(shown, "send input_text")
            raise Invalid(
                f"A content part of type {shown!r} is not supported here; {instead}.",
                param="input",
            )
        if name == "text":
            return document
        kept = {each: value for each, value in document.items() if each != name}
        return {**kept, "text": document.get(name)}

    @model_validator(mode="after")
    def _has_what_its_type_says(self) -> Part:
        if self.text is None and self.type != "input_image":
            raise ValueError("a part with text needs the field text")
        return self

    def as_part(self) -> dict[str, Any]:
        """As chat has it."""
        if self.type == "input_image":
            return {"type": "image_url", "image_url": {"url": self.image_url}}
        return {"type": "text", "text": self.text}

    def as_document(self) -> dict[str, Any]:
        """As an item of the input has it."""
        if self.type == "input_image":
            return {"type": self.type, "image_url": self.image_url, "detail": "auto"}
        return {"type": "input_text", "text": self.text}


Content = str | Annotated[list[Part], Field(fail_fast=True)]


class InputItem(LenientBody):
    """One item, of any type; which of the fields it needs depends on that."""

    type: str = Field("message", max_length=64)
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: Content | None = None
    summary: Content | None = None
    # From answers that clients send back; none of them is part of a prompt.
    status: Any = None
    phase: Any = None
    encrypted_content: Any = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        kind = document.get("type")
        if kind is None:
            is_reference = "id" in document and document.get("role") is None
            document = {**document, "type": "item_reference" if is_reference else "message"}
        elif isinstance(kind, str) and kind in WORDLESS:
            return {"type": kind}
        changed: dict[str, Any] = {}
        for name in ("content", "output", "summary"):
            value = document.get(name)
            if isinstance(value, list) and any(isinstance(part, str) for part in value):
                changed[name] = [{"text": p} if isinstance(p, str) else p for p in value]
        for name in ("arguments", "output"):
            if isinstance(document.get(name), dict | int | float):  # as some clients keep them
                changed[name] = _json(document[name])
        return {**document, **changed} if changed else document

    @model_validator(mode="after")
    def _is_whole(self) -> InputItem:
        kind = self.type
        if kind in WORDLESS:
            return self
        if kind not in KNOWN:
            shown = f" {kind!r}" if re.fullmatch(r"\w+", kind) else ""
            raise ValueError(
                f"items of this type{shown} are not supported: no hosted tool runs here; send "
                "function_call and function_call_output"
            )
        if kind == "message":
            if self.role is None:
                raise ValueError("a message needs a role: user, assistant, system or developer")
            if self.content is None and self.role != "assistant":
                raise ValueError(f"a message of role {self.role} needs content")
        elif kind == "item_reference":
            if not self.id:
                raise ValueError("an item_reference needs the id of an item")
        elif kind in CALLS and not self.name:
            raise ValueError(f"a {kind} needs the name of its tool")
        elif kind in OUTPUTS and self.output is None:
            raise ValueError(f"a {kind} needs an output")
        return self

    @property
    def has_images(self) -> bool:
        parts = self.content if isinstance(self.content, list) else ()
        return any(part.type == "input_image" for part in parts)

    @property
    def text(self) -> str:
        """Of its content."""
        return text_of(self.content)

    def as_document(self, made_id: str) -> dict[str, Any]:
        """The item as it is kept and listed; `made_id` for one that has none of its own."""
        document: dict[str, Any] = {"id": self.id or made_id, "type": self.type}
        if self.type == "message":
            if self.role == "assistant":
                part = {"type": "output_text", "annotations": []}
                parts = [{**part, "text": text} for text in _texts(self.content)]
            else:
                parts = _documents(self.content)
            return {**document, "role": self.role, "status": "completed", "content": parts}
        if self.type == "reasoning":
            document["summary"] = [
                {"type": "summary_text", "text": text} for text in _texts(self.summary)
            ]
            if self.content is not None:
                document["content"] = [
                    {"type": "reasoning_text", "text": text} for text in _texts(self.content)
                ]
            return document
        document |= {"call_id": self.call_id or "", "status": "completed"}
        if self.namespace is not None:
            document["namespace"] = self.namespace
        if self.type == "function_call":
            return {**document, "name": self.name, "arguments": self.arguments or "{}"}
        if self.type == "custom_tool_call":
            return {**document, "name": self.name, "input": self.input or ""}
        output = self.output
        return {**document, "output": _documents(output) if isinstance(output, list) else output}


def _parts(content: str | list[Part] | None) -> Any:
    """As chat has it; one part is the same as its text, which every template takes."""
    if not isinstance(content, list):
        return content
    if len(content) == 1 and content[0].text is not None:
        return content[0].text
    return [part.as_part() for part in content]


def _documents(content: str | list[Part] | None) -> list[dict[str, Any]]:
    if isinstance(content, list):
        return [part.as_document() for part in content]
    return [{"type": "input_text", "text": content or ""}]


def text_of(content: str | list[Part] | None) -> str:
    return "".join(_texts(content))


def _texts(content: str | list[Part] | None) -> list[str]:
    if content is None:
        return []
    return [content] if isinstance(content, str) else [part.text or "" for part in content]


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise Invalid("An item of the input is nested too deeply.", param="input") from error


def messages_of(items: Iterable[InputItem], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation as chat messages.

    What the assistant said, thought and called in one turn is one message. `developer` is OpenAI's
    later name of `system`, which few templates know; what stands before the first turn, the
    instructions first, is one system message, as most templates take only one.
    """
    messages: list[dict[str, Any]] = []
    more: list[str] = []  # of the system message that comes first
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        if item.type == "message" and item.role != "assistant":
            role = "user" if item.role == "user" else "system"
            is_second = len(messages) == 1 and messages[0]["role"] == role == "system"
            if is_second and not item.has_images and isinstance(messages[0]["content"], str):
                # Several parts are several lines, as in chat.
                more.append("\n".join(_texts(item.content)))
            else:
                messages.append({"role": role, "content": _parts(item.content)})
        elif item.type in OUTPUTS:
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": item.call_id or "",
                    "content": _parts(item.output),
                }
            )
        elif item.type not in WORDLESS:
            _add_to_turn(messages, item)
    if more:
        messages[0]["content"] = "\n\n".join([messages[0]["content"], *more])
    return messages


def _add_to_turn(messages: list[dict[str, Any]], item: InputItem) -> None:
    """Add to the assistant's last message, or begin one."""
    turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if item.type in CALLS:
        if turn is None:
            turn = {"role": "assistant"}
            messages.append(turn)
        arguments = item.arguments or "{}"
        if item.type == "custom_tool_call":
            arguments = _json({"input": item.input or ""})
        call = {"name": flat_name(item.namespace, item.name or ""), "arguments": arguments}
        turn.setdefault("tool_calls", []).append(
            {"id": item.call_id or item.id or "", "type": "function", "function": call}
        )
        return
    field, text = "content", item.text
    if item.type == "reasoning":
        field, text = "reasoning", item.text or text_of(item.summary)
        if not text:  # encrypted, for another server
            return
    # Reasoning comes before what it is about, text before calls.
    later = (
        {"reasoning", "content", "tool_calls"}
        if field == "reasoning"
        else {"content", "tool_calls"}
    )
    if turn is None or later & turn.keys():
        messages.append({"role": "assistant", field: text})
    else:
        turn[field] = text


def kept_ids(items: Sequence[InputItem], response_hex: str) -> list[dict[str, Any]]:
    """The items as documents; those without an id get one that leads to the response."""
    return [
        item.as_document(f"{PREFIXES[item.type]}_{response_hex}_i{number}")
        for number, item in enumerate(items)
        if item.type not in WORDLESS
    ]
