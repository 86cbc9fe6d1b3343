"""Errors in OpenAI's JSON shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math
from http import HTTPStatus

from fastapi import Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from serve.errors import ErrorKind, Internal, Invalid, ServeError


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


def invalid_from(error: ValidationError) -> Invalid:
    """The first fault of a body, with place and value: `max_tokens=-1: should be at least 1`."""
    faults = error.errors(include_url=False)
    # A union reports a fault for each of its branches; the deepest is of the branch that was meant.
    first = faults[0]["loc"][:1]
    fault = max((f for f in faults if f["loc"][:1] == first), key=lambda f: len(f["loc"]))
    place = ".".join(str(part) for part in fault["loc"] if not _is_branch(part))
    # Text is never repeated: it may be the prompt, which must not reach logs and gateways.
    value = f"={fault['input']!r}" if isinstance(fault["input"], int | float) else ""
    if fault["type"] == "extra_forbidden":
        return Invalid(f"{place}: this server knows no such field; remove it.", param=place)
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Invalid(f"{place}{value}: {message}." if place else f"{message}.", param=place or None)


def _is_branch(part: int | str) -> bool:
    """Whether a part of a location names a union's branch (`str`, `list[...]`) and not a field."""
    return isinstance(part, str) and (part in {"str", "constrained-str"} or "[" in part)
