"""Errors as answers report them, in OpenAI's words."""

from __future__ import annotations

from typing import TypedDict

from packhorse.serve.errors import Internal, ServeError


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


def retry_after_s(error: ServeError) -> float | None:
    """When the client should try again, in seconds; None: not at all."""
    return error.retry_after_s if error.mapping.retry else None


def unexpected() -> Internal:
    """What the client is told about a bug. The details are in the log."""
    return Internal("The server failed on this request; the request id leads to its log.")
