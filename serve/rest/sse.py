"""A stream of chunks as server-sent events, written straight to ASGI.

What is equal in all events of a stream is prepared once; a token costs one JSON string and one
send.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import aclosing

from fastapi import Response
from starlette.types import Receive, Scope, Send

from serve.errors import Cancelled, ServeError
from serve.rest.body import unless_disconnected
from serve.rest.errors import error_body
from serve.service import Stream

HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
DONE = b"data: [DONE]\n\n"
# Text -> JSON string. C-accelerated, and escapes non-ASCII, which is safe in every client.
_quote: Callable[[str], str] = json.encoder.encode_basestring_ascii


class EventStream(Response):
    """Sends `opening`, one event a chunk, the usage when asked for, and [DONE].

    An event is `head` + the chunk's text as JSON + `tail` with the finish reason filled in. An
    error after the first byte becomes the last event but one.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        opening: bytes,
        head: str,
        tail: Callable[[str | None], str],
        usage: Callable[[Stream], bytes] | None,
    ) -> None:
        self._stream = stream
        self._opening = opening
        self._head = head
        self._tail = tail
        self._usage = usage
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._write(send))
        except Cancelled:
            return
        finally:
            await self._stream.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        more = {"type": "http.response.body", "more_body": True}
        head, tail = self._head, self._tail
        end = tail(None)
        pending = self._opening
        try:
            async with aclosing(aiter(self._stream)) as chunks:
                async for chunk in chunks:
                    text = _quote(chunk.text)
                    suffix = end if chunk.finish_reason is None else tail(chunk.finish_reason)
                    await send({**more, "body": pending + f"{head}{text}{suffix}".encode()})
                    pending = b""
            if self._usage is not None:
                pending = self._usage(self._stream)
        except ServeError as error:
            pending = b"data: " + error_body(error) + b"\n\n"
        await send({"type": "http.response.body", "body": pending + DONE, "more_body": False})
