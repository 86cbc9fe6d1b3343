"""Errors as answers report them, in OpenAI's words and in Anthropic's."""

from __future__ import annotations

from typing import TypedDict

from packhorse.serve.errors import ErrorKind, Internal, QuotaSpent, ServeError


class ErrorDocument(TypedDict):
    """OpenAI's fields of an error; `kind` is Packhorse's own word for it."""

    message: str
    type: str
    param: str | None
    code: str | None
    kind: str


def error_document(error: ServeError) -> ErrorDocument:
    return {
        "message": error.message,
        "type": error.mapping.openai_type,
        "param": error.param,
        "code": error.openai_code,
        "kind": str(error.kind),
    }


class AnthropicError(TypedDict):
    """Anthropic's fields of an error."""

    type: str
    message: str


# Of other kinds: invalid_request_error.
_ANTHROPIC = {
    ErrorKind.UNAUTHENTICATED: "authentication_error",
    ErrorKind.FORBIDDEN: "permission_error",
    ErrorKind.UNKNOWN_MODEL: "not_found_error",
    ErrorKind.NOT_FOUND: "not_found_error",
    ErrorKind.TOO_LARGE: "request_too_large",
    ErrorKind.OVERLOADED: "overloaded_error",
    ErrorKind.UNAVAILABLE: "overloaded_error",
    ErrorKind.DEADLINE: "timeout_error",
    ErrorKind.INTERNAL: "api_error",
}


def anthropic_error(error: ServeError) -> AnthropicError:
    """Clients tell a spent quota from a full server by the type."""
    kind = _ANTHROPIC.get(error.kind, "invalid_request_error")
    if isinstance(error, QuotaSpent):
        kind = "rate_limit_error"
    return {"type": kind, "message": error.message}


def retry_after_s(error: ServeError) -> float | None:
    """When the client should try again, in seconds; None: not at all."""
    return error.retry_after_s if error.mapping.retry else None


def unexpected() -> Internal:
    """What the client is told about a bug. The details are in the log."""
    return Internal("The server failed on this request; the request id leads to its log.")
