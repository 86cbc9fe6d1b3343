"""Compares the two protocols: the same request over HTTP and over gRPC, from one table.

`as_message` turns an HTTP body into the equivalent protobuf message; `said_in_json` and
`said_in_messages` bring both answers into one form, `Said`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status

from packhorse.serve.rpc.pb import inference_pb2 as pb
from tests.client import CHAT, TEXT

SERVICE = "/packhorse.v1.Inference/"
ANSWERS: dict[str, type[Message]] = {
    "Chat": pb.ChatResponse,
    "ChatStream": pb.ChatChunk,
    "Complete": pb.CompleteResponse,
    "CompleteStream": pb.CompleteChunk,
}
# Fields that only HTTP has: without effect, or expressed differently in gRPC.
DROPPED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "modalities", "stream", "stream_options",
}  # fmt: skip
REASONS = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


class NotExpressible(Exception):
    """A body that HTTP can send and gRPC cannot: mostly values of wrong types."""


def as_message(path: str, body: dict[str, Any]) -> tuple[str, Message]:
    """The method's name, and its request. Raises NotExpressible."""
    given = {
        name: value for name, value in body.items() if value is not None and name not in DROPPED
    }
    stream = "Stream" if body.get("stream") else ""
    if "model" not in given or {"response_format", "structured_outputs"} <= given.keys():
        raise NotExpressible("not sent is not empty, and there is one form of a constraint")
    try:
        if path == CHAT:
            return "Chat" + stream, _chat(given)
        if path == TEXT:
            return "Complete" + stream, _complete(given)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise NotExpressible(str(error)) from error
    raise NotExpressible(path)


def _chat(body: dict[str, Any]) -> pb.ChatRequest:
    request = pb.ChatRequest()
    limits = {body.pop(name) for name in ("max_tokens", "max_completion_tokens") if name in body}
    if len(limits) > 1:
        raise NotExpressible("gRPC has one limit")
    for limit in limits:
        body["max_tokens"] = limit
    for message in body.pop("messages"):
        calls = message.get("tool_calls") or ()
        fields = {name: value for name, value in message.items() if name != "tool_calls"}
        made = request.messages.add(**{n: v for n, v in fields.items() if v is not None})
        for call in calls:
            made.tool_calls.add(id=call["id"], **call["function"])
    tools = body.pop("tools", None)
    if tools is not None and not tools:
        raise NotExpressible("an empty list is none")
    for tool in tools or ():
        if tool.keys() != {"type", "function"} or tool["type"] != "function":
            raise NotExpressible("a tool is a function")
        function = dict(tool["function"])
        parameters = function.pop("parameters", None)
        made_tool = request.tools.add(**function)
        if parameters is not None:
            made_tool.parameters_json = json.dumps(parameters)
    choice = body.pop("tool_choice", None)
    if choice is not None:
        request.tool_choice = choice if isinstance(choice, str) else choice["function"]["name"]
    for document in body.pop("documents", ()):
        request.documents.add(fields=document)
    if "chat_template_kwargs" in body:
        request.chat_template_kwargs_json = json.dumps(body.pop("chat_template_kwargs"))
    _fill(request, body)
    return request


def _complete(body: dict[str, Any]) -> pb.CompleteRequest:
    request = pb.CompleteRequest()
    prompt = body.pop("prompt", ())
    is_batch = isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int))
    for one in prompt if is_batch else [prompt] if prompt != () else ():
        if isinstance(one, str):
            request.prompts.add(text=one)
        else:
            request.prompts.add(token_ids=pb.TokenIds(ids=one))
    _fill(request, body)
    return request


def _fill(request: Any, body: dict[str, Any]) -> None:
    """Set the remaining fields, those of the request and those of its options."""
    options = request.options
    options.SetInParent()
    wanted = body.pop("response_format", None)
    if wanted is not None and wanted["type"] == "json_object":
        options.structured_outputs.json_object = True
    elif wanted is not None and wanted["type"] == "json_schema":
        options.structured_outputs.json = json.dumps(wanted["json_schema"]["schema"])
    elif wanted is not None and wanted["type"] != "text":
        raise NotExpressible("an unknown format")
    constraint = body.pop("structured_outputs", None)
    if constraint is not None:
        if len(constraint) != 1:
            raise NotExpressible("a constraint is one")
        for kind, value in constraint.items():
            if kind == "choice":
                options.structured_outputs.choice.values.extend(value)
                options.structured_outputs.choice.SetInParent()
            else:
                text = json.dumps(value) if kind == "json" else value
                setattr(options.structured_outputs, kind, text)
    if "cache" in body:
        options.cache.CopyFrom(pb.Cache(**body.pop("cache")))
    for name, value in body.items():
        where = request if name in request.DESCRIPTOR.fields_by_name else options
        wanted_type = where.DESCRIPTOR.fields_by_name[name].type
        if isinstance(value, bool) != (wanted_type == FieldDescriptor.TYPE_BOOL):
            raise NotExpressible("a number is no truth, nor the other way round")
        if name == "logit_bias":
            for token, bias in value.items():
                options.logit_bias[int(token)] = bias
        elif name == "stop" and isinstance(value, str):
            options.stop.append(value)
        elif isinstance(value, list):
            if not value:
                raise NotExpressible("an empty list is none")
            getattr(where, name).extend(value)
        else:
            setattr(where, name, value)


@dataclass
class Choice:
    """The content of one choice, whichever protocol it came over."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    stop_reason: Any = None
    calls: list[list[str]] = field(default_factory=list)
    logprobs: list[tuple[str, float | None]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


@dataclass
class Said:
    """The content of an answer, whole or collected from a stream."""

    model: str
    choices: dict[int, Choice]
    usage: tuple[int, int, int]


def said_in_json(documents: Sequence[Any]) -> Said:
    """One whole answer, or the events of a stream with usage."""
    choices: dict[int, Choice] = {}
    for document in documents:
        for given in document["choices"]:
            made = choices.setdefault(given["index"], Choice())
            message = given.get("message") or given.get("delta") or {}
            made.text += message.get("content") or given.get("text") or ""
            made.reasoning += message.get("reasoning") or ""
            made.finish_reason = given.get("finish_reason") or made.finish_reason
            made.stop_reason = given.get("stop_reason", made.stop_reason)
            made.token_ids += given.get("token_ids") or []
            for place, call in enumerate(message.get("tool_calls") or ()):
                number = call.get("index", place)
                while len(made.calls) <= number:
                    made.calls.append(["", ""])
                made.calls[number][0] += call["function"].get("name") or ""
                made.calls[number][1] += call["function"].get("arguments") or ""
            logprobs = given.get("logprobs") or {}
            for entry in logprobs.get("content") or ():
                made.logprobs.append((entry["token"], entry["logprob"]))
            for name, value in zip(
                logprobs.get("tokens", ()), logprobs.get("token_logprobs", ()), strict=True
            ):
                made.logprobs.append((name, value))
    usage = documents[-1]["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    counts = (usage["prompt_tokens"], usage["completion_tokens"], cached)
    return Said(documents[0]["model"], choices, counts)


def said_in_messages(messages: Sequence[Any]) -> Said:
    """One response, or the chunks of a stream."""
    choices: dict[int, Choice] = {}
    model, usage = "", pb.Usage()
    for message in messages:
        if isinstance(message, pb.ChatResponse | pb.CompleteResponse):
            model, usage = message.model, message.usage
            for given in message.choices:
                _add(choices.setdefault(given.index, Choice()), given)
            continue
        if message.HasField("opening"):
            model = message.opening.model
        elif message.HasField("usage"):
            usage = message.usage
        else:
            _add(choices.setdefault(message.index, Choice()), message)
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
    return Said(model, choices, counts)


def _add(choice: Choice, given: Any) -> None:
    if isinstance(given, pb.ChatChoice):
        source: Any = given.message
        choice.text += source.content
    else:
        source = given
        choice.text += given.content if isinstance(given, pb.ChatChunk) else given.text
    if isinstance(given, pb.ChatChoice | pb.ChatChunk):
        choice.reasoning += source.reasoning
        for place, call in enumerate(source.tool_calls):
            number = getattr(call, "index", place)
            while len(choice.calls) <= number:
                choice.calls.append(["", ""])
            choice.calls[number][0] += call.name
            choice.calls[number][1] += call.arguments
    choice.finish_reason = REASONS[given.finish_reason] or choice.finish_reason
    kind = given.stop_reason.WhichOneof("kind")
    if kind is not None:
        choice.stop_reason = getattr(given.stop_reason, kind)
    choice.token_ids += given.token_ids
    for entry in given.logprobs:
        known = entry.logprob if entry.HasField("logprob") else None
        choice.logprobs.append((entry.token, known))


def method(channel: Any, name: str, answer: type[Message] | None = None) -> Any:
    """A method by its name, without generated stubs."""
    kind = channel.unary_stream if name.endswith("Stream") else channel.unary_unary
    return kind(
        SERVICE + name,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=(answer or ANSWERS[name]).FromString,
    )


def metadata(headers: dict[str, str] | None) -> tuple[tuple[str, str], ...]:
    return tuple((headers or {}).items())


@dataclass
class Failed:
    """An error: the kind that both protocols name, and what it says."""

    code: str
    kind: str
    message: str
    param: str | None = None
    retry_s: float | None = None
    openai: tuple[str, str | None] | None = field(default=None, compare=False)
    """OpenAI's type and code."""


def failed_in_grpc(error: grpc.RpcError | grpc.aio.AioRpcError) -> Failed:
    trailers = dict(error.trailing_metadata() or ())
    status = Status.FromString(trailers["grpc-status-details-bin"])
    made = Failed(error.code().name, "", status.message)
    for packed in status.details:
        for kind in (details.ErrorInfo, details.BadRequest, details.RetryInfo):
            found: Any = kind()
            if not packed.Unpack(found):
                continue
            if kind is details.ErrorInfo:
                made.kind = found.reason.lower()
                words = found.metadata
                made.openai = words["openai_type"], words["openai_code"] or None
            elif kind is details.BadRequest:
                made.param = found.field_violations[0].field
            else:
                made.retry_s = found.retry_delay.ToTimedelta().total_seconds()
    return made
