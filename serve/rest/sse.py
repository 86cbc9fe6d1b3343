"""Streams of chunks as server-sent events, written straight to ASGI.

What is equal in all events of a stream is prepared once; a token of plain text costs one JSON
string and one send.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Response
from packhorse.serve import metrics
from packhorse.serve.errors import Cancelled, ServeError
from packhorse.serve.messages import Chunk
from packhorse.serve.rest.errors import error_body
from packhorse.serve.rest.requests import unless_disconnected
from packhorse.serve.rest.responses import Shape, usage_json
from packhorse.serve.stream import Stream, merged
from starlette.types import Receive, Scope, Send

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on as they come
]
DONE = b"data: [DONE]\n\n"
# A comment, which clients skip: it keeps proxies from taking a long wait for an end.
HEARTBEAT = b": waiting\n\n"
# Text -> JSON string. C-accelerated, and escapes non-ASCII, which is safe in every client.
_quote: Callable[[str], str] = json.encoder.encode_basestring_ascii


class EventStream(Response):
    """Sends the openings, one event a chunk, the usage when asked for, and [DONE].

    An error after the first byte becomes the last event but one. With `include_usage` every event
    but the last has `"usage": null`, as OpenAI's do; with `continuous_usage` each has the count of
    its own prompt so far.
    """

    def __init__(
        self,
        starting: asyncio.Future[list[Stream]],
        shape: Shape,
        common: Callable[[Sequence[Stream]], dict[str, Any]],
        *,
        include_usage: bool,
        continuous_usage: bool,
        stalled_client_timeout_s: float,
        heartbeat_s: float | None,
        headers: Callable[[Sequence[Stream]], dict[str, str]],
    ) -> None:
        """`starting` gives the streams; if it is not done, comments are sent until it is. `common`
        makes the fields that all events share, and `headers` those of the answer, which has none of
        them when they are not known at its start. Raises ServeError when nothing could be started.
        """
        self._starting = starting
        self._shape = shape
        self._common = common
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._look_every_s = stalled_client_timeout_s / 2
        # Goes up before and after each send, so it is odd while one is on its way.
        self._sends = 0
        self._seen_sends: tuple[int, ...] = ()
        self._heartbeat_s = heartbeat_s
        self._beat: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None
        self._beat_at_sends = -1
        self._is_over = False
        self.background = None
        self._streams: Sequence[Stream] = ()
        self._start_headers = HEADERS
        if starting.done():
            self._opened(starting.result())
            more = headers(self._streams)
            self._start_headers = [*HEADERS, *((n.encode(), v.encode()) for n, v in more.items())]

    def _opened(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        common = self._common(streams)
        self._prefix = json.dumps({**common, "object": self._shape.event_object})[:-1]
        self._choices = streams[0].request.sampling.n

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The server's own send: what wraps it looks at the start of a response only.
        state = scope.get("state", {})
        body_send: Send = state.get("send", send)
        state["is_event_stream"] = True
        try:
            await unless_disconnected(
                receive,
                self._write(send, body_send),
                look_every_s=self._look_every_s,
                look=self._look_for_progress,
            )
        except _Stalled:
            metrics.STALLED_CLIENTS.inc()
            await _cut_off(body_send, receive)
        except Cancelled:
            return
        finally:
            self._is_over = True
            for waiting in (self._beat, self._beating, self._starting):
                if waiting is not None:
                    waiting.cancel()
            if not self._streams:
                await asyncio.wait([self._starting])  # it ends what it has begun
                if not self._starting.cancelled() and self._starting.exception() is None:
                    self._streams = self._starting.result()
            for stream in self._streams:
                await stream.close()

    def _beats(self, send: Send) -> None:
        """Comments in long silences, so that proxies do not take one for an end. `send` writes at
        once or waits, so a comment never comes into an event.
        """
        if self._heartbeat_s is None or self._is_over:
            return
        is_quiet = self._beat_at_sends == self._sends and self._sends % 2 == 0
        if is_quiet and (self._beating is None or self._beating.done()):
            self._beating = asyncio.create_task(self._send_comment(send))
        self._beat_at_sends = self._sends
        loop = asyncio.get_running_loop()
        self._beat = loop.call_later(self._heartbeat_s, self._beats, send)

    async def _send_comment(self, send: Send) -> None:
        if not self._is_over:
            with contextlib.suppress(RuntimeError):  # the stream has ended while this waited
                await send(_body(HEARTBEAT))

    def _look_for_progress(self) -> None:
        """Raises _Stalled when one send has been on its way at the last two looks, too."""
        now = self._sends
        if now % 2 == 0:
            self._seen_sends = ()
            return
        if self._seen_sends == (now, now):
            raise _Stalled
        self._seen_sends = (*self._seen_sends[-1:], now)

    async def _write(self, send: Send, body_send: Send) -> None:
        self._sends += 1
        await send({"type": "http.response.start", "status": 200, "headers": self._start_headers})
        self._sends += 1
        pending = b""
        try:
            if not self._streams:
                await body_send(_body(HEARTBEAT))
                self._beats(body_send)
                self._opened(await self._starting)
            else:
                self._beats(body_send)
            pending = b"".join(map(self._opening, range(len(self._streams) * self._choices)))
            if len(self._streams) == 1:
                pending = await self._write_one(self._streams[0], body_send, pending)
            else:
                async with aclosing(merged(self._streams)) as chunks:
                    async for number, chunk in chunks:
                        event = self._event(number, chunk)
                        self._sends += 1
                        await body_send(_body(pending + event))
                        self._sends += 1
                        pending = b""
            if self._include_usage:
                usages = [stream.usage for stream in self._streams]
                pending += self._wrap("[]", json.dumps(usage_json(usages)))
        except ServeError as error:
            pending += b"data: " + error_body(error) + b"\n\n"
        self._is_over = True
        self._sends += 1
        await body_send({"type": "http.response.body", "body": pending + DONE, "more_body": False})

    async def _write_one(self, stream: Stream, send: Send, pending: bytes) -> bytes:
        """The events of a single stream, `pending` before the first."""
        shape = self._shape
        plain = shape.all_plain and not self._continuous_usage
        head = f'data: {self._prefix}, "choices": [{{"index": 0, {shape.head}'
        end = ', "usage": null' if self._include_usage else ""
        tail = f'{shape.close}, "logprobs": null, "finish_reason": null}}]{end}}}\n\n'
        async with aclosing(aiter(stream)) as chunks:
            async for chunk in chunks:
                if plain and chunk.finish_reason is None and chunk.is_plain:
                    event = f"{head}{_quote(chunk.text)}{tail}".encode()
                else:
                    event = self._event(0, chunk)
                if pending:
                    event, pending = pending + event, b""
                self._sends += 1
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._sends += 1
        return pending

    def _event(self, number: int, chunk: Chunk) -> bytes:
        """Any event; `number` is the stream's."""
        stream = self._streams[number]
        index = number * self._choices + chunk.index
        choice = self._shape.event(index, chunk, stream.prompt)
        return self._wrap(f"[{json.dumps(choice)}]", self._usage_so_far(stream))

    def _opening(self, index: int) -> bytes:
        choice = self._shape.opening(index)
        if choice is None:
            return b""
        stream = self._streams[index // self._choices]
        extras = {} if index else self._shape.opening_extras(stream.prompt)
        return self._wrap(f"[{json.dumps(choice)}]", self._usage_so_far(stream), extras)

    def _usage_so_far(self, stream: Stream) -> str | None:
        if self._continuous_usage:
            return json.dumps(usage_json([stream.usage]))
        return "null" if self._include_usage else None

    def _wrap(self, choices: str, usage: str | None, extras: dict[str, Any] | None = None) -> bytes:
        end = "" if usage is None else f', "usage": {usage}'
        if extras:
            end += ", " + json.dumps(extras)[1:-1]
        return f'data: {self._prefix}, "choices": {choices}{end}}}\n\n'.encode()


def _body(content: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": True}


class _Stalled(Exception):
    """The client takes nothing."""


async def _cut_off(send: Send, receive: Receive) -> None:
    """Close the connection at once. ASGI has no word for it: a response that just ends would wait
    for the client to take what is buffered. uvicorn's own `send` belongs to what has the transport.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()
        while (await receive())["type"] != "http.disconnect":
            pass
