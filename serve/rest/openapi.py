"""The OpenAPI document, where FastAPI cannot derive it: bodies that are read by hand, and answers
that are encoded by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from packhorse.serve.adapters.base import State
from packhorse.serve.api.admin import AdapterBody, PinBody
from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.tokenize import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from packhorse.serve.errors import ERROR_MAPPINGS, ErrorKind
from packhorse.serve.messages import RouteStage

BODIES = (
    ChatBody, CompletionBody, TokenizeChatBody, TokenizeTextBody, DetokenizeBody, AdapterBody,
    PinBody,
)  # fmt: skip
REFERENCE = "#/components/schemas/{model}"


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required)}


STRING = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
USAGE = _object(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    {
        "prompt_tokens_details": _object({"cached_tokens": COUNT}),
        "completion_tokens_details": _object({"reasoning_tokens": COUNT}),
    },
)
REASON = {"enum": ["stop", "length", "tool_calls"]}
LOGPROBS = {"type": ["object", "null"]}
MESSAGE = _object(
    {"role": {"const": "assistant"}, "content": {"type": ["string", "null"]}},
    {"reasoning": STRING, "tool_calls": {"type": "array", "items": {"type": "object"}}},
)
ERROR = _object(
    {
        "error": _object(
            {"message": STRING, "type": STRING, "kind": {"enum": [*map(str, ErrorKind)]}},
            {"param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}},
        )
    }
)


def _generated(name: str, choice: dict[str, Any]) -> dict[str, Any]:
    return _object(
        {
            "id": STRING,
            "object": {"const": name},
            "created": COUNT,
            "model": STRING,
            "choices": {
                "type": "array",
                "minItems": 1,
                "items": _object(
                    {**choice, "index": COUNT, "finish_reason": REASON, "logprobs": LOGPROBS}
                ),
            },
            "usage": USAGE,
        }
    )


MODEL = _object(
    {
        "id": STRING,
        "object": {"const": "model"},
        "created": COUNT,
        "owned_by": STRING,
        "max_model_len": COUNT,
    },
    {"parent": STRING},
)
ADAPTER = _object(
    {
        "name": STRING,
        "state": {"enum": list(get_args(State))},
        "digest": {"type": ["string", "null"]},
        "rank": {"type": ["integer", "null"]},
        "pinned": {"type": "boolean"},
        "requests": COUNT,
        "reason": {"type": ["string", "null"]},
    }
)
ROUTING = _object(
    {
        "number": COUNT,
        "created": COUNT,
        "rules": {"type": "array", "items": STRING},
        "report": {"type": "object"},
    }
)
SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": ERROR,
    "ChatCompletion": _generated("chat.completion", {"message": MESSAGE}),
    "Completion": _generated("text_completion", {"text": STRING}),
    "Model": MODEL,
    "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": MODEL}}),
    "Adapter": ADAPTER,
    "Adapters": _object({"object": {"const": "list"}, "data": {"type": "array", "items": ADAPTER}}),
    "Removed": _object({"name": STRING, "removed": {"const": True}}),
    "Decision": _object(
        {
            "model": STRING,
            "adapter": {"type": ["string", "null"]},
            "stage": {"enum": list(get_args(RouteStage))},
            "margin": {"type": ["number", "null"]},
            "reason": STRING,
            "trace": {"type": "array", "items": {"type": "object"}},
        }
    ),
    "Routing": ROUTING,
    "Routings": _object({"object": {"const": "list"}, "data": {"type": "array", "items": ROUTING}}),
    "Reloaded": _object(
        {
            "accepted": {"type": "boolean"},
            "reasons": {"type": "array", "items": STRING},
            "generation": ROUTING,
        }
    ),
    "Cache": _object(
        {
            "flushed": {"type": "boolean"},
            "memory_entries": COUNT,
            "memory_bytes": COUNT,
            "store_entries": {"type": ["integer", "null"]},
        }
    ),
    "Tokens": _object(
        {
            "count": COUNT,
            "max_model_len": COUNT,
            "tokens": {"type": "array", "items": COUNT},
            "token_strs": {"type": ["array", "null"], "items": STRING},
        }
    ),
    "Text": _object({"prompt": STRING}),
    "Status": _object({"status": STRING}),
    "Version": _object(
        {"version": STRING, "vllm": {"type": ["string", "null"]}},
        {"patches": {"type": "array", "items": {"type": "object"}}},
    ),
}


def body_document(*schemas: type[BaseModel]) -> dict[str, Any]:
    """The `requestBody` of an endpoint that reads one of these."""
    references = [{"$ref": REFERENCE.format(model=schema.__name__)} for schema in schemas]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def documented(name: str, *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint: the schema of its answer, and every kind of error."""
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": REFERENCE.format(model=name)}}
    }
    if streams:
        content["text/event-stream"] = {"schema": STRING}
    error = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "ok", "content": content}}
    for kind in ErrorKind:
        if kind is not ErrorKind.CANCELLED:  # nobody is there to read it
            status = ERROR_MAPPINGS[kind].http
            responses[status] = {"description": "see docs/api.md", "content": error}
    return responses


def add_schemas(app: FastAPI, model: str | None) -> None:
    """Add the schemas that endpoints refer to to the app's OpenAPI document. `model` is the name of
    the only model, when there is only one.
    """
    derived: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        document = derived()
        _, bodies = models_json_schema(
            [(body, "validation") for body in BODIES], ref_template=REFERENCE
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(SCHEMAS, **bodies["$defs"])
        for body in (ChatBody, CompletionBody) if model else ():
            schemas[body.__name__]["properties"]["model"]["enum"] = [model]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
