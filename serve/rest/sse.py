"""Server-sent events, written straight to ASGI.

`EventStream` knows how a stream is sent: its start, heartbeats, clients that leave or stop reading,
its end. What the events say comes from an `Events`. A token of plain text costs one JSON string
and one send.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Response
from starlette.types import Receive, Scope, Send

from packhorse.serve.errors import Cancelled, ServeError
from packhorse.serve.messages import Chunk
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.pipeline import Stream, merged
from packhorse.serve.rest.requests import ClientWatch

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on as they come
]
# A comment, which clients skip: proxies close connections on which nothing is sent for long.
HEARTBEAT = b": waiting\n\n"
# Text -> JSON string. C-accelerated, and escapes non-ASCII, which is safe in every client.
_quote: Callable[[str], str] = json.encoder.encode_basestring_ascii


class Events(Protocol):
    """Encodes the events of one streamed call."""

    def begin(self, streams: Sequence[Stream]) -> bytes:
        """What comes before the first chunk. Called once, before all else."""
        ...

    def plain(self) -> tuple[str, str] | None:
        """The head and tail of the event that streams a plain chunk of a call's only stream; its
        text, as a JSON string, goes between. None: `event` encodes every chunk.
        """
        ...

    def event(self, number: int, chunk: Chunk) -> bytes:
        """The events for a chunk of the stream with this number."""
        ...

    def end(self) -> bytes:
        """What comes after the last chunk."""
        ...

    def fail(self, error: ServeError) -> bytes:
        """What comes instead of the rest when a stream fails midway."""
        ...


class EventStream(Response):
    """Starts the streams of one call and sends their events.

    All runs in the connection's own task. An error before the first byte is raised, for the
    application to answer; one after it becomes the last events. A start that takes longer than
    heartbeat_s no longer delays the first byte: the response begins, with a heartbeat.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[list[Stream]]],
        events: Events,
        *,
        stalled_client_timeout_s: float,
        heartbeat_s: float | None,
        headers: Callable[[Sequence[Stream]], dict[str, str]],
        metrics: ServerMetrics,
        heartbeat: bytes = HEARTBEAT,
    ) -> None:
        """`start` gives the streams. `headers` makes the response's headers from them; they are
        left out when the response begins before the streams are there. `heartbeat` is what is sent
        to keep the connection.
        """
        self._heartbeat = heartbeat
        self._start = start
        self._events = events
        self._headers_of = headers
        self._metrics = metrics
        self._look_every_s = stalled_client_timeout_s / 2
        self._looking: asyncio.TimerHandle | None = None
        # Incremented before and after each send, so it is odd while a send is in progress.
        self._sends = 0
        self._seen_sends: tuple[int, ...] = ()
        self._heartbeat_s = heartbeat_s
        self._beat: asyncio.TimerHandle | None = None
        self._beating: asyncio.Task[None] | None = None
        self._beat_at_sends = -1
        self._has_begun = False
        self._is_over = False
        self.background = None
        self._streams: Sequence[Stream] = ()
        self._failure: ServeError | None = None
        self._unsent = b""
        """What comes before the first event; sent together with it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The server's own send: its wrappers only look at the start of a response.
        state = scope.get("state", {})
        body_send: Send = state.get("send", send)
        state["is_event_stream"] = True
        try:
            async with ClientWatch(scope, receive) as watch:
                self._look_later(watch)
                await self._open(send, body_send)
                await self._write(body_send)
        except _Stalled:
            self._metrics.stalled_clients.inc()
            await _cut_off(body_send, receive)
        except Cancelled:
            if not self._has_begun:
                raise
        finally:
            self._is_over = True
            for waiting in (self._beat, self._beating, self._looking):
                if waiting is not None:
                    waiting.cancel()
            for stream in self._streams:
                await stream.close()

    async def _open(self, send: Send, body_send: Send) -> None:
        """Start the streams and send what comes before the first event. Raises ServeError while no
        byte has been sent.
        """
        loop = asyncio.get_running_loop()
        early = None
        if self._heartbeat_s is not None:
            early = loop.call_later(self._heartbeat_s, self._begin_early, send, body_send)
        try:
            self._streams = await self._start()
        except ServeError as error:
            if not self._has_begun:
                raise
            self._failure = error
        finally:
            if early is not None:
                early.cancel()
        if self._has_begun:
            return
        more = self._headers_of(self._streams)
        await self._begin(send, [(name.encode(), value.encode()) for name, value in more.items()])
        self._beats(body_send)

    async def _begin(self, send: Send, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._has_begun = True
        start = {"type": "http.response.start", "status": 200, "headers": [*HEADERS, *headers]}
        self._sends += 1
        await send(start)
        self._sends += 1

    def _begin_early(self, send: Send, body_send: Send) -> None:
        self._has_begun = True
        self._beating = asyncio.create_task(self._begin_without_streams(send, body_send))

    async def _begin_without_streams(self, send: Send, body_send: Send) -> None:
        await self._begin(send, ())
        await body_send(_body(self._heartbeat))
        self._beats(body_send)

    def _beats(self, send: Send) -> None:
        """Send a comment when nothing was sent for a while, so that proxies keep the connection.
        `send` writes at once or waits, so a comment never lands inside an event.
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
            with contextlib.suppress(RuntimeError):  # the stream ended meanwhile
                await send(_body(self._heartbeat))

    def _look_later(self, watch: ClientWatch) -> None:
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(self._look_every_s, self._look_for_progress, watch)

    def _look_for_progress(self, watch: ClientWatch) -> None:
        """Cut the client off when the same send was in progress at the last two looks, too."""
        now = self._sends
        if now % 2 == 0:
            self._seen_sends = ()
        elif self._seen_sends == (now, now):
            watch.interrupt(_Stalled())
            return
        else:
            self._seen_sends = (*self._seen_sends[-1:], now)
        self._look_later(watch)

    async def _write(self, send: Send) -> None:
        events = self._events
        if self._beating is not None:  # it is sending the beginning
            self._sends += 1  # or a client that does not read would go unnoticed here
            await asyncio.wait([self._beating])
            self._sends += 1
        try:
            if self._failure is not None:
                raise self._failure
            self._unsent = events.begin(self._streams)
            if len(self._streams) == 1:
                await self._write_one(self._streams[0], send)
            else:
                async with aclosing(merged(self._streams)) as chunks:
                    async for number, chunk in chunks:
                        event = events.event(number, chunk)
                        event, self._unsent = self._unsent + event, b""
                        self._sends += 1
                        await send(_body(event))
                        self._sends += 1
            last = events.end()
        except ServeError as error:
            last = events.fail(error)
        self._is_over = True
        self._sends += 1
        last = self._unsent + last
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _write_one(self, stream: Stream, send: Send) -> None:
        """Send the events of the only stream."""
        event_of = self._events.event
        plain = self._events.plain()
        head, tail = plain or ("", "")
        is_plain = plain is not None
        async with aclosing(aiter(stream)) as chunks:
            async for chunk in chunks:
                if is_plain and chunk.finish_reason is None and chunk.is_plain:
                    event = f"{head}{_quote(chunk.text)}{tail}".encode()
                else:
                    event = event_of(0, chunk)
                if self._unsent:
                    event, self._unsent = self._unsent + event, b""
                self._sends += 1
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._sends += 1


def _body(content: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": True}


class _Stalled(Exception):
    """The client reads nothing."""


async def _cut_off(send: Send, receive: Receive) -> None:
    """Close the connection at once. ASGI cannot say so: a response that just ends would wait for
    the client to read what is buffered. uvicorn's `send` is a method of the object that has the
    transport.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()
        while (await receive())["type"] != "http.disconnect":
            pass
