"""Errors in OpenAI's JSON shape and words, `{"error": {"message", "type", "param", "code"}}`, and
our own `kind` beside them.
"""

from __future__ import annotations

import json
import math
from http import HTTPStatus

from fastapi import Request, Response
from packhorse.serve.errors import ErrorKind, Internal, Invalid, NotFound, ServeError
from packhorse.serve.rest.compression import CODINGS
from starlette.exceptions import HTTPException


def error_body(error: ServeError) -> bytes:
    """The JSON of an error; also the last event of a stream that fails after its first byte."""
    document = {
        "message": error.message,
        "type": error.wire.openai_type,
        "param": error.param,
        "code": error.openai_code,
        "kind": str(error.kind),
    }
    return json.dumps({"error": document}).encode()


def error_response(error: ServeError) -> Response:
    headers = {}
    if error.wire.retry:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    else:
        # OpenAI's clients send again after 409 and every 5xx, unless told.
        headers["x-should-retry"] = "false"
    if error.kind is ErrorKind.UNSUPPORTED_CODING:
        headers["accept-encoding"] = ", ".join(CODINGS)  # RFC 9110, section 15.5.16
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
    known = NotFound(message) if error.status_code == 404 else Invalid(message)
    body = error_body(known)
    return Response(body, error.status_code, error.headers, media_type="application/json")


def on_unexpected(request: Request, error: Exception) -> Response:
    """A bug, which RequestIds logs; nothing of it goes out."""
    return error_response(
        Internal("The server failed on this request; the request id leads to its log.")
    )
