"""Errors as gRPC statuses: a code from the one table of errors, and google.rpc details, which
clients in every language can read.
"""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status

from packhorse.serve.api.errors import error_document, retry_after_s
from packhorse.serve.errors import ServeError

DOMAIN = "packhorse"
DETAILS = "grpc-status-details-bin"
# Header lists are bounded, by 8 KiB in most clients.
MAX_MESSAGE_CHARACTERS = 2000


def code_of(error: ServeError) -> grpc.StatusCode:
    return grpc.StatusCode[error.mapping.grpc]


def message_of(error: ServeError) -> str:
    return _text(error.message)


def _text(text: str) -> str:
    """Short enough, and without lone surrogates, which protobuf refuses."""
    return text[:MAX_MESSAGE_CHARACTERS].encode(errors="replace").decode()


def details_of(error: ServeError, request_id: str) -> bytes:
    """A serialized google.rpc.Status: ErrorInfo (the kind, and OpenAI's words for it), RequestInfo,
    RetryInfo for errors worth a retry, BadRequest where a field is at fault.
    """
    document = error_document(error)
    openai = {"openai_type": document["type"], "openai_code": document["code"] or ""}
    found: list[Message] = [
        details.ErrorInfo(reason=document["kind"].upper(), domain=DOMAIN, metadata=openai),
        details.RequestInfo(request_id=request_id),
    ]
    if (after_s := retry_after_s(error)) is not None:
        delay = Duration()
        delay.FromMilliseconds(round(after_s * 1000))
        found.append(details.RetryInfo(retry_delay=delay))
    if error.param is not None:
        violation = details.BadRequest.FieldViolation(
            field=_text(error.param), description=message_of(error)
        )
        found.append(details.BadRequest(field_violations=[violation]))
    status = Status(code=code_of(error).value[0], message=message_of(error))
    for detail in found:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return bytes(status.SerializeToString())
