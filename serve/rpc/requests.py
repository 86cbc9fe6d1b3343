"""Protobuf messages of requests to the bodies of api/, so that gRPC has the limits and errors of
HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.fields import refuse_half_characters
from packhorse.serve.api.tokenize import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import Invalid
from packhorse.serve.rpc.pb import inference_pb2 as pb

TOOL_CHOICES = ("none", "auto", "required")


def chat_body(request: pb.ChatRequest, *, stream: bool) -> ChatBody:
    """Raises Invalid."""
    body = sent_fields(request, "model", "parallel_tool_calls", "logprobs", "top_logprobs")
    body |= sent_fields(request, "include_reasoning", "reasoning_effort")
    body |= _conversation(request) | _options(request.options)
    if request.HasField("tool_choice"):
        choice = request.tool_choice
        named = {"type": "function", "function": {"name": choice}}
        body["tool_choice"] = choice if choice in TOOL_CHOICES else named
    if request.documents:
        body["documents"] = [dict(document.fields) for document in request.documents]
    return validated({**body, "stream": stream}, ChatBody)


def completion_body(request: pb.CompleteRequest, *, stream: bool) -> CompletionBody:
    """Raises Invalid."""
    body = sent_fields(request, "model", "echo", "logprobs") | _options(request.options)
    if sent := prompts(request.prompts, "prompts"):
        body["prompt"] = sent if len(sent) > 1 else sent[0]
    return validated({**body, "stream": stream}, CompletionBody)


def prompts(sent: Iterable[pb.Prompt], name: str) -> list[str | list[int]]:
    """The prompts of a batch, all text or all token ids. Raises Invalid."""
    found = [
        list(prompt.token_ids.ids) if prompt.WhichOneof("kind") == "token_ids" else prompt.text
        for prompt in sent
    ]
    if len({type(prompt) for prompt in found}) > 1:
        raise Invalid(
            f"{name}: some are text and some are token ids; send a call for each kind.",
            param=name,
        )
    return found


def tokenize_body(request: pb.TokenizeRequest) -> TokenizeChatBody | TokenizeTextBody:
    """Raises Invalid."""
    body = sent_fields(request, "model", "add_special_tokens", "return_token_strs")
    if request.WhichOneof("input") == "conversation":
        return validated(body | _conversation(request.conversation), TokenizeChatBody)
    return validated(body | {"prompt": request.prompt}, TokenizeTextBody)


def detokenize_body(request: pb.DetokenizeRequest) -> DetokenizeBody:
    """Raises Invalid."""
    body = sent_fields(request, "model") | {"tokens": list(request.tokens)}
    return validated(body, DetokenizeBody)


def sent_fields(message: Any, *names: str) -> dict[str, Any]:
    """Those of the fields that were sent; fields without presence count as sent."""
    fields = message.DESCRIPTOR.fields_by_name
    return {
        name: getattr(message, name)
        for name in names
        if not fields[name].has_presence or message.HasField(name)
    }


def _conversation(request: Any) -> dict[str, Any]:
    """The fields that ChatRequest and Conversation share."""
    body = sent_fields(request, "add_generation_prompt", "continue_final_message")
    body["messages"] = [_message(message) for message in request.messages]
    if request.tools:
        body["tools"] = [_tool(tool, number) for number, tool in enumerate(request.tools)]
    if request.HasField("chat_template_kwargs_json"):
        name = "chat_template_kwargs_json"
        body["chat_template_kwargs"] = _object(request.chat_template_kwargs_json, name)
    return body


def _message(message: pb.Message) -> dict[str, Any]:
    document = sent_fields(message, "role", "content", "name", "reasoning", "tool_call_id")
    if message.tool_calls:
        document["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return document


def _tool(tool: pb.Tool, number: int) -> dict[str, Any]:
    function = sent_fields(tool, "name", "description", "strict")
    if tool.HasField("parameters_json"):
        place = f"tools.{number}.parameters_json"
        function["parameters"] = _object(tool.parameters_json, place)
    return {"type": "function", "function": function}


def _options(options: pb.Options) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for field, value in options.ListFields():
        name = field.name
        if name == "logit_bias":
            body[name] = {str(token): bias for token, bias in value.items()}
        elif name == "structured_outputs":
            body[name] = _constraint(value)
        elif name == "cache":
            body[name] = sent_fields(value, "mode", "max_age_s")
        elif field.is_repeated:
            body[name] = list(value)
        else:
            body[name] = value
    return body


def _constraint(outputs: pb.StructuredOutputs) -> dict[str, Any]:
    kind = outputs.WhichOneof("kind")
    if kind is None:
        return {}
    value = getattr(outputs, kind)
    return {kind: list(value.values) if kind == "choice" else value}


def _object(text: str, name: str) -> dict[str, Any]:
    """The JSON object in a text field. Raises Invalid when it is none."""
    try:
        found = json.loads(text)
        refuse_half_characters(found)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Invalid(f"{name}: the text is not a JSON object.", param=name)
    return found
