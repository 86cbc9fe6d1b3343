"""Requests: protobuf messages to the same bodies that HTTP validates, so that limits and errors are
the same.
"""

from __future__ import annotations

import json
from typing import Any

from packhorse.serve.api.chat import ChatBody, TokenizeChatBody, TokenizeTextBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.fields import refuse_half_characters
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import Invalid
from packhorse.serve.rpc.pb import inference_pb2 as pb

TOOL_CHOICES = ("none", "auto", "required")


def chat_body(request: pb.ChatRequest, *, stream: bool) -> ChatBody:
    """Raises Invalid."""
    body = _set(request, "model", "parallel_tool_calls", "logprobs", "top_logprobs")
    body |= _set(request, "include_reasoning", "reasoning_effort")
    body |= _conversation(request) | _options(request.options)
    if request.HasField("tool_choice"):
        choice = request.tool_choice
        named = {"type": "function", "function": {"name": choice}}
        body["tool_choice"] = choice if choice in TOOL_CHOICES else named
    if request.documents:
        body["documents"] = [dict(document.fields) for document in request.documents]
    return validated({**body, "stream": stream}, ChatBody)


def complete_body(request: pb.CompleteRequest, *, stream: bool) -> CompletionBody:
    """Raises Invalid."""
    body = _set(request, "model", "echo", "logprobs") | _options(request.options)
    prompts = [
        list(prompt.token_ids.ids) if prompt.WhichOneof("kind") == "token_ids" else prompt.text
        for prompt in request.prompts
    ]
    if len({type(prompt) for prompt in prompts}) > 1:
        raise Invalid(
            "prompts: some are text and some are token ids; send a call for each kind.",
            param="prompts",
        )
    if prompts:
        body["prompt"] = prompts if len(prompts) > 1 else prompts[0]
    return validated({**body, "stream": stream}, CompletionBody)


def tokenize_body(request: pb.TokenizeRequest) -> TokenizeChatBody | TokenizeTextBody:
    """Raises Invalid."""
    body = _set(request, "model", "add_special_tokens", "return_token_strs")
    if request.WhichOneof("input") == "conversation":
        return validated(body | _conversation(request.conversation), TokenizeChatBody)
    return validated(body | {"prompt": request.prompt}, TokenizeTextBody)


def _set(message: Any, *names: str) -> dict[str, Any]:
    """These fields, as far as they were sent; those without presence always."""
    fields = message.DESCRIPTOR.fields_by_name
    return {
        name: getattr(message, name)
        for name in names
        if not fields[name].has_presence or message.HasField(name)
    }


def _conversation(request: Any) -> dict[str, Any]:
    """What ChatRequest and Conversation share."""
    body = _set(request, "add_generation_prompt", "continue_final_message")
    body["messages"] = [_message(message) for message in request.messages]
    if request.tools:
        body["tools"] = [_tool(tool, number) for number, tool in enumerate(request.tools)]
    if request.HasField("chat_template_kwargs_json"):
        name = "chat_template_kwargs_json"
        body["chat_template_kwargs"] = _object(request.chat_template_kwargs_json, name)
    return body


def _message(message: pb.Message) -> dict[str, Any]:
    made = _set(message, "role", "content", "name", "reasoning", "tool_call_id")
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return made


def _tool(tool: pb.Tool, number: int) -> dict[str, Any]:
    function = _set(tool, "name", "description", "strict")
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
            body[name] = _set(value, "mode", "max_age_s")
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
    """Raises Invalid unless it is a JSON object."""
    try:
        found = json.loads(text)
        refuse_half_characters(found)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Invalid(f"{name}: the text is not a JSON object.", param=name)
    return found
