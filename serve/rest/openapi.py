"""The OpenAPI document, where FastAPI cannot derive it: bodies that are read by hand, and answers
that are encoded by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from packhorse.serve.adapters.base import State
from packhorse.serve.api.admin import AdapterBody, PinBody
from packhorse.serve.api.anthropic import CountTokensBody, MessagesBody
from packhorse.serve.api.batches import BatchBody
from packhorse.serve.api.chat import ChatBody
from packhorse.serve.api.completions import CompletionBody
from packhorse.serve.api.embeddings import EmbeddingBody
from packhorse.serve.api.pooling import ClassifyBody, PoolBody
from packhorse.serve.api.rerank import RerankBody, ScoreBody
from packhorse.serve.api.responses.body import ResponseBody
from packhorse.serve.api.tokenize import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from packhorse.serve.batches.records import Status
from packhorse.serve.errors import ERROR_MAPPINGS, ErrorKind
from packhorse.serve.messages import RouteStage

BODIES = (
    ChatBody, CompletionBody, TokenizeChatBody, TokenizeTextBody, DetokenizeBody, AdapterBody,
    BatchBody, PinBody, MessagesBody, CountTokensBody, EmbeddingBody, RerankBody, ScoreBody,
    ClassifyBody, PoolBody, ResponseBody,
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


FLOATS = {"type": "array", "items": {"type": "number"}}
# Numbers, or the base64 text of their bytes.
VECTOR = {"anyOf": [FLOATS, STRING]}
INPUT_USAGE = _object({"prompt_tokens": COUNT, "total_tokens": COUNT})


def _pooled(entry: dict[str, Any]) -> dict[str, Any]:
    """The answer of a call on a pooling model: an entry an input."""
    return _object(
        {
            "id": STRING,
            "object": {"const": "list"},
            "created": COUNT,
            "model": STRING,
            "data": {"type": "array", "minItems": 1, "items": _object({"index": COUNT, **entry})},
            "usage": INPUT_USAGE,
        }
    )


RANKED = _object(
    {"index": COUNT, "relevance_score": {"type": "number"}},
    {"document": _object({"text": STRING})},
)
MODEL = _object(
    {
        "id": STRING,
        "object": {"const": "model"},
        "created": COUNT,
        "owned_by": STRING,
        "max_model_len": COUNT,
    },
    {"parent": STRING, "runner": {"enum": ["pooling"]}},
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
TIME = {"type": ["integer", "null"]}
FILE = _object(
    {
        "id": STRING,
        "object": {"const": "file"},
        "bytes": COUNT,
        "created_at": COUNT,
        "expires_at": COUNT,
        "filename": STRING,
        "purpose": {"enum": ["batch", "batch_output"]},
        "status": {"const": "processed"},
    }
)
BATCH = _object(
    {
        "id": STRING,
        "object": {"const": "batch"},
        "endpoint": STRING,
        "errors": {"type": ["object", "null"]},
        "input_file_id": STRING,
        "completion_window": STRING,
        "status": {"enum": list(get_args(Status))},
        "output_file_id": {"type": ["string", "null"]},
        "error_file_id": {"type": ["string", "null"]},
        "created_at": COUNT,
        "expires_at": COUNT,
        **dict.fromkeys(
            (
                "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
                "cancelling_at", "cancelled_at",
            ),
            TIME,
        ),
        "request_counts": _object({"total": COUNT, "completed": COUNT, "failed": COUNT}),
        "usage": {"type": "object"},
        "metadata": {"type": ["object", "null"]},
    }
)  # fmt: skip


def _page(item: dict[str, Any]) -> dict[str, Any]:
    return _object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": item},
            "first_id": {"type": ["string", "null"]},
            "last_id": {"type": ["string", "null"]},
            "has_more": {"type": "boolean"},
        }
    )


SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": ERROR,
    "File": FILE,
    "Files": _page(FILE),
    "FileDeleted": _object({"id": STRING, "object": {"const": "file"}, "deleted": {"const": True}}),
    "Batch": BATCH,
    "Batches": _page(BATCH),
    "ChatCompletion": _generated("chat.completion", {"message": MESSAGE}),
    "Completion": _generated("text_completion", {"text": STRING}),
    "Embeddings": _pooled({"object": {"const": "embedding"}, "embedding": VECTOR}),
    "Scores": _pooled({"object": {"const": "score"}, "score": {"type": "number"}}),
    "Classes": _pooled(
        {"label": {"type": ["string", "null"]}, "probs": FLOATS, "num_classes": COUNT}
    ),
    "Vectors": _pooled(
        {
            "object": {"const": "pooling"},
            "data": {"anyOf": [FLOATS, {"type": "array", "items": FLOATS}, STRING]},
        }
    ),
    "Ranking": _object(
        {
            "id": STRING,
            "model": STRING,
            "usage": INPUT_USAGE,
            "results": {"type": "array", "items": RANKED},
            "meta": {"type": "object"},
        }
    ),
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


MESSAGE_USAGE = _object(
    {
        "input_tokens": COUNT,
        "cache_creation_input_tokens": COUNT,
        "cache_read_input_tokens": COUNT,
        "output_tokens": COUNT,
    },
    {"output_tokens_details": _object({"thinking_tokens": COUNT})},
)
# Anthropic's API.
SCHEMAS |= {
    "AnthropicError": _object(
        {
            "type": {"const": "error"},
            "error": _object({"type": STRING, "message": STRING}),
            "request_id": {"type": ["string", "null"]},
        }
    ),
    "Message": _object(
        {
            "id": STRING,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": STRING,
            "content": {
                "type": "array",
                "items": _object({"type": {"enum": ["text", "thinking", "tool_use"]}}),
            },
            "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
            "stop_sequence": {"type": ["string", "null"]},
            "usage": MESSAGE_USAGE,
        }
    ),
    "MessageTokens": _object({"input_tokens": COUNT}),
}


NULLABLE = {"type": ["object", "null"]}
# OpenAI's Responses API.
SCHEMAS |= {
    "Response": _object(
        {
            "id": STRING,
            "object": {"const": "response"},
            "created_at": COUNT,
            "model": STRING,
            "status": {
                "enum": [
                    "queued", "in_progress", "completed", "incomplete", "failed", "cancelled",
                ]
            },
            "output": {
                "type": "array",
                "items": _object(
                    {
                        "id": STRING,
                        "type": {
                            "enum": ["message", "reasoning", "function_call", "custom_tool_call"]
                        },
                    }
                ),
            },
            "error": NULLABLE,
            "incomplete_details": NULLABLE,
            "usage": {
                "anyOf": [
                    {"type": "null"},
                    _object(
                        {
                            "input_tokens": COUNT,
                            "input_tokens_details": _object({"cached_tokens": COUNT}),
                            "output_tokens": COUNT,
                            "output_tokens_details": _object({"reasoning_tokens": COUNT}),
                            "total_tokens": COUNT,
                        }
                    ),
                ]
            },
            "tools": {"type": "array", "items": {"type": "object"}},
            "tool_choice": {"type": ["string", "object"]},
            "parallel_tool_calls": {"type": "boolean"},
            "previous_response_id": {"type": ["string", "null"]},
        }
    ),
    "ResponseDeleted": _object(
        {"id": STRING, "object": {"const": "response"}, "deleted": {"const": True}}
    ),
    "ResponseItems": _object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": _object({"id": STRING, "type": STRING})},
            "first_id": STRING,
            "last_id": STRING,
            "has_more": {"type": "boolean"},
        }
    ),
    "InputTokens": _object({"object": {"const": "response.input_tokens"}, "input_tokens": COUNT}),
}  # fmt: skip


def body_document(*schemas: type[BaseModel]) -> dict[str, Any]:
    """The `requestBody` of an endpoint that reads one of these."""
    references = [{"$ref": REFERENCE.format(model=schema.__name__)} for schema in schemas]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def documented(
    name: str, *, streams: bool = False, error: Literal["Error", "AnthropicError"] = "Error"
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint: the schema of its answer, and every kind of error in one form
    or the other.
    """
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": REFERENCE.format(model=name)}}
    }
    if streams:
        content["text/event-stream"] = {"schema": STRING}
    failed = {"application/json": {"schema": {"$ref": REFERENCE.format(model=error)}}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "ok", "content": content}}
    for kind in ErrorKind:
        if kind is not ErrorKind.CANCELLED:  # nobody is there to read it
            status = ERROR_MAPPINGS[kind].http
            responses[status] = {"description": "see docs/api.md", "content": failed}
    if error == "AnthropicError":
        responses[529] = {"description": "see docs/anthropic.md", "content": failed}
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
        named = (ChatBody, CompletionBody, ResponseBody, MessagesBody, CountTokensBody)
        for body in named if model else ():
            schemas[body.__name__]["properties"]["model"]["enum"] = [model]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
