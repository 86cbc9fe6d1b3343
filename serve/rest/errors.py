"""Errors in OpenAI's JSON shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math
from http import HTTPStatus

from fastapi import Request, Response
from starlette.exceptions import HTTPException

from serve.errors import ErrorKind, Internal, ServeError


def error_body(error: ServeError) -> bytes:
    """The JSON of an error; also the last event of a stream that fails after its first byte."""
    return _body(error.message, error.wire.openai_type, error.param, str(error.kind))


def _body(message: str, openai_type: str, param: str | None, code: str) -> bytes:
    return json.dumps(
        {"error": {"message": message, "type": openai_type, "param": param, "code": code}}
    ).encode()


def error_response(error: ServeError) -> Response:
    headers = {}
    if error.wire.retry:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.kind is ErrorKind.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"  # RFC 6750, section 3
    return Response(error_body(error), error.wire.http, headers, media_type="application/json")


def on_serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error)


def on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, which the framework itself answers."""
    assert isinstance(error, HTTPException)
    message = (
        f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}."
    )
    body = _body(
        message,
        "invalid_request_error",
        None,
        "not_found" if error.status_code == 404 else "invalid",
    )
    return Response(body, error.status_code, error.headers, media_type="application/json")


def on_unexpected(request: Request, error: Exception) -> Response:
    """A bug, which RequestIds logs; nothing of it goes out."""
    return error_response(
        Internal("The server failed on this request; the request id leads to its log.")
    )
