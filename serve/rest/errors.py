"""Errors as JSON responses: `{"error": {"message", "type", "param", "code", "kind"}}`, and in
Anthropic's form where its clients call.
"""

from __future__ import annotations

import json
import math
from http import HTTPStatus

from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from packhorse.serve.api.errors import (
    anthropic_error,
    error_document,
    retry_after_s,
    unexpected,
)
from packhorse.serve.errors import ErrorKind, Invalid, NotFound, QuotaSpent, ServeError
from packhorse.serve.rest.requests import CODINGS

ANTHROPIC = "/v1/messages"
OVERLOADED = 529
"""Anthropic's status for a server that is full; 429 is for spent quotas."""


def is_anthropic(scope: Scope) -> bool:
    """Whether a client of Anthropic's API calls: by the path, or of /v1/models by its header."""
    path: str = scope["path"]
    if path.startswith(ANTHROPIC):
        return path == ANTHROPIC or path.startswith(ANTHROPIC + "/")
    return path.startswith("/v1/models") and any(
        name == b"anthropic-version" for name, _ in scope["headers"]
    )


def error_body(error: ServeError) -> bytes:
    """The JSON of an error: a response's body, or an event of a stream that fails midway."""
    return json.dumps({"error": error_document(error)}).encode()


def anthropic_error_body(error: ServeError, request_id: str | None) -> bytes:
    """The same in Anthropic's form."""
    document = {"type": "error", "error": anthropic_error(error), "request_id": request_id}
    return json.dumps(document).encode()


def error_response(error: ServeError, scope: Scope | None = None) -> Response:
    """The response to the request of `scope`, whose client decides its form."""
    body, status = error_body(error), error.mapping.http
    if scope is not None and is_anthropic(scope):
        body = anthropic_error_body(error, scope.get("state", {}).get("request_id"))
        if error.kind is ErrorKind.OVERLOADED and not isinstance(error, QuotaSpent):
            status = OVERLOADED
    headers = {}
    if (after_s := retry_after_s(error)) is not None:
        headers["retry-after"] = str(math.ceil(after_s))
    else:
        # OpenAI's clients retry after 409 and every 5xx, unless told not to.
        headers["x-should-retry"] = "false"
    if error.kind is ErrorKind.UNSUPPORTED_CODING:
        headers["accept-encoding"] = ", ".join(CODINGS)  # RFC 9110, section 15.5.16
    if error.kind is ErrorKind.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"  # RFC 6750, section 3
    return Response(body, status, headers, media_type="application/json")


def raw_error_response(status: HTTPStatus, error: ServeError) -> bytes:
    """A whole HTTP/1.1 response, for a connection on which no request can be answered."""
    body = error_body(error)
    after_s = retry_after_s(error)
    retry = "" if after_s is None else f"retry-after: {math.ceil(after_s)}\r\n"
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
    )
    return head.encode() + body


def on_serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error, request.scope)


def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, which the framework itself answers."""
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}."
    )
    known = NotFound(message) if error.status_code == 404 else Invalid(message)
    body = error_body(known)
    if is_anthropic(request.scope):
        body = anthropic_error_body(known, getattr(request.state, "request_id", None))
    return Response(body, error.status_code, error.headers, media_type="application/json")


def on_unexpected(request: Request, error: Exception) -> Response:
    """A bug, which RequestIds logs; no detail goes out."""
    return error_response(unexpected(), request.scope)
