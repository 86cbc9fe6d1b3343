"""Every error that a caller can meet, and the one table that says what each becomes on the wire.

ServeError
  Invalid            the request's own fault; message says value, limit, fix
  Unauthenticated    no key, or an unknown one
  Forbidden          a known key, not allowed
  UnknownModel       no such model or adapter
  NotFound           admin: no such thing
  Conflict           admin: it exists already, or is in use
  TooLarge           body above the limit
  Cancelled          the caller left
  Overloaded         refused at once; try later
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
    CANCELLED = "cancelled"
    OVERLOADED = "overloaded"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


@dataclass(frozen=True)
class Wire:
    """How one kind of error looks from outside. `grpc` is the name of a status code, so that this
    stays a leaf.
    """

    http: int
    grpc: str
    openai_type: str
    retry: bool = False


WIRE: dict[ErrorKind, Wire] = {
    ErrorKind.INVALID: Wire(400, "INVALID_ARGUMENT", "invalid_request_error"),
    ErrorKind.UNAUTHENTICATED: Wire(401, "UNAUTHENTICATED", "authentication_error"),
    ErrorKind.FORBIDDEN: Wire(403, "PERMISSION_DENIED", "permission_error"),
    ErrorKind.UNKNOWN_MODEL: Wire(404, "NOT_FOUND", "invalid_request_error"),
    ErrorKind.NOT_FOUND: Wire(404, "NOT_FOUND", "invalid_request_error"),
    ErrorKind.CONFLICT: Wire(409, "FAILED_PRECONDITION", "invalid_request_error"),
    ErrorKind.TOO_LARGE: Wire(413, "INVALID_ARGUMENT", "invalid_request_error"),
    # 499 never reaches anybody: the client is gone. It is what the log and the metrics show.
    ErrorKind.CANCELLED: Wire(499, "CANCELLED", "invalid_request_error"),
    ErrorKind.OVERLOADED: Wire(429, "RESOURCE_EXHAUSTED", "rate_limit_error", retry=True),
    ErrorKind.DEADLINE: Wire(504, "DEADLINE_EXCEEDED", "timeout_error", retry=True),
    ErrorKind.UNAVAILABLE: Wire(503, "UNAVAILABLE", "service_unavailable_error", retry=True),
    ErrorKind.INTERNAL: Wire(500, "INTERNAL", "internal_server_error"),
}


class ServeError(Exception):
    """An error with a kind. `param` names the request field at fault; `retry_after_s` is for kinds
    worth a retry.
    """

    kind = ErrorKind.INTERNAL

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def wire(self) -> Wire:
        return WIRE[self.kind]


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


class Cancelled(ServeError):
    kind = ErrorKind.CANCELLED


class Overloaded(ServeError):
    kind = ErrorKind.OVERLOADED


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
