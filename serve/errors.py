"""Every error that a caller can meet, and the one table that maps each kind to the protocols.

ServeError
  Invalid            the request's own fault; message says value, limit, fix
  Unauthenticated    no key, or an unknown one
  Forbidden          a known key, not allowed
  UnknownModel       no such model or adapter
  NotFound           admin: no such thing
  Conflict           admin: it exists already, or is in use
  TooLarge           body above the limit
  UnsupportedCoding  body compressed in a way that is not known here
  Cancelled          the caller left
  Overloaded         refused at once; try later (QuotaSpent: by a limit of the key's own)
  DeadlineExceeded   took longer than the caller or the server allows
  Unavailable        engine starting, dead or draining; try later
  Internal           anything unexpected; no detail goes out
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ErrorKind(StrEnum):
    """What went wrong, independent of protocol."""

    INVALID = "invalid"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    UNKNOWN_MODEL = "unknown_model"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    TOO_LARGE = "too_large"
    UNSUPPORTED_CODING = "unsupported_coding"
    CANCELLED = "cancelled"
    OVERLOADED = "overloaded"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


@dataclass(frozen=True)
class ErrorMapping:
    """What one kind of error becomes in each protocol. `grpc` is the name of a status code, so that
    this module imports no gRPC. `openai_type` and `openai_code` are OpenAI's words, where it has
    any.
    """

    http: int
    grpc: str
    openai_type: str
    openai_code: str | None = None
    retry: bool = False


ERROR_MAPPINGS: dict[ErrorKind, ErrorMapping] = {
    ErrorKind.INVALID: ErrorMapping(400, "INVALID_ARGUMENT", "invalid_request_error"),
    ErrorKind.UNAUTHENTICATED: ErrorMapping(
        401, "UNAUTHENTICATED", "invalid_request_error", "invalid_api_key"
    ),
    ErrorKind.FORBIDDEN: ErrorMapping(
        403, "PERMISSION_DENIED", "invalid_request_error", "permission_denied"
    ),
    ErrorKind.UNKNOWN_MODEL: ErrorMapping(
        404, "NOT_FOUND", "invalid_request_error", "model_not_found"
    ),
    ErrorKind.NOT_FOUND: ErrorMapping(404, "NOT_FOUND", "invalid_request_error"),
    ErrorKind.CONFLICT: ErrorMapping(409, "FAILED_PRECONDITION", "invalid_request_error"),
    ErrorKind.TOO_LARGE: ErrorMapping(413, "INVALID_ARGUMENT", "invalid_request_error"),
    ErrorKind.UNSUPPORTED_CODING: ErrorMapping(415, "INVALID_ARGUMENT", "invalid_request_error"),
    # 499 never reaches anybody: the client is gone. It is what the log and the metrics show.
    ErrorKind.CANCELLED: ErrorMapping(499, "CANCELLED", "invalid_request_error"),
    ErrorKind.OVERLOADED: ErrorMapping(
        429, "RESOURCE_EXHAUSTED", "requests", "rate_limit_exceeded", retry=True
    ),
    # No retry: what took too long once would take as long again.
    ErrorKind.DEADLINE: ErrorMapping(504, "DEADLINE_EXCEEDED", "timeout_error"),
    ErrorKind.UNAVAILABLE: ErrorMapping(
        503, "UNAVAILABLE", "server_error", "service_unavailable", retry=True
    ),
    ErrorKind.INTERNAL: ErrorMapping(500, "INTERNAL", "server_error"),
}


class ServeError(Exception):
    """An error with a kind. `param` names the request field at fault; `code` is OpenAI's word for
    it, where that is more exact than its kind's; `retry_after_s` is for kinds worth a retry.
    """

    kind = ErrorKind.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = 1.0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self._code = code
        self.retry_after_s = retry_after_s

    @property
    def mapping(self) -> ErrorMapping:
        return ERROR_MAPPINGS[self.kind]

    @property
    def openai_code(self) -> str | None:
        return self._code or self.mapping.openai_code


class Invalid(ServeError):
    kind = ErrorKind.INVALID


class Unauthenticated(ServeError):
    kind = ErrorKind.UNAUTHENTICATED


class Forbidden(ServeError):
    kind = ErrorKind.FORBIDDEN


class UnknownModel(ServeError):
    kind = ErrorKind.UNKNOWN_MODEL


class NotFound(ServeError):
    kind = ErrorKind.NOT_FOUND


class Conflict(ServeError):
    kind = ErrorKind.CONFLICT


class TooLarge(ServeError):
    kind = ErrorKind.TOO_LARGE


class UnsupportedCoding(ServeError):
    kind = ErrorKind.UNSUPPORTED_CODING


class Cancelled(ServeError):
    kind = ErrorKind.CANCELLED


class Overloaded(ServeError):
    kind = ErrorKind.OVERLOADED


class QuotaSpent(Overloaded):
    """A limit of the key's own: the server has room for others."""


class DeadlineExceeded(ServeError):
    kind = ErrorKind.DEADLINE


class Unavailable(ServeError):
    kind = ErrorKind.UNAVAILABLE


class EngineDied(Unavailable):
    """The engine is gone, and with it all that it was doing. A new one may do it."""


class EngineHung(EngineDied):
    """The engine makes no progress, and is not waited for any longer."""


class Internal(ServeError):
    kind = ErrorKind.INTERNAL


class StartupError(Exception):
    """The server cannot start as configured; the command line exits with 2."""
