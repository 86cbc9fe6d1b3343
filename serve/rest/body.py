"""From raw request to validated body: size limit, JSON, schema. Also: noticing that the client has
left.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serve.errors import Cancelled, Invalid, TooLarge
from serve.rest.errors import invalid_from

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


async def read_body(request: Request, schema: type[Body], *, max_bytes: int) -> Body:
    """The request's JSON as `schema`. Raises TooLarge before reading it all, else Invalid."""
    return validated(await read_object(request, max_bytes=max_bytes), schema)


async def read_object(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """The request's JSON object. Raises TooLarge before reading it all, else Invalid."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise TooLarge(f"The body has {declared} bytes, above the limit of {max_bytes}; send less.")
    raw = bytearray()
    try:
        async for part in request.stream():
            raw += part
            if len(raw) > max_bytes:
                raise TooLarge(f"The body is above the limit of {max_bytes} bytes; send less.")
    except ClientDisconnect as error:
        raise Cancelled("The client closed the connection.") from error
    try:
        text = raw.decode()  # strict, where json.loads would let surrogates pass
        document = json.loads(text)
        if "\\ud" in text.lower():
            # An escaped half of a surrogate pair is valid JSON but no text that a tokenizer takes.
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise Invalid("The body is not valid UTF-8 text.") from error
    except ValueError as error:
        raise Invalid(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise Invalid("The body's JSON is nested too deeply.") from error
    if not isinstance(document, dict):
        raise Invalid(f"The body must be a JSON object, not {type(document).__name__}.")
    return document


def validated(document: dict[str, Any], schema: type[Body]) -> Body:
    """The object as `schema`. Raises Invalid with its first fault."""
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise invalid_from(error) from error


async def unless_disconnected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Await `work`, but cancel it when the client leaves: nothing else notices that before the
    first byte is sent.

    Needs the body to have been read. Raises Cancelled when the client left first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for other in (task, watch):
            other.cancel()
        # Not `await task`: its own end, by cancellation or by an error, is looked at below.
        await asyncio.wait({task, watch})
    if task.cancelled():
        raise Cancelled("The client closed the connection.")
    return task.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
