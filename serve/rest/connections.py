"""Bounds on connections: how many, how long one may take to say what it wants, in how many bytes.

uvicorn has none of them: whoever connects may stay, and what has been sent of a header is kept.
`Connection` is uvicorn's own protocol, with its callbacks followed; `listen` builds the kind of it
that is in `tolerant`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from http import HTTPStatus
from typing import Any, Protocol

from packhorse.serve import metrics
from packhorse.serve.errors import DeadlineExceeded, ServeError, TooLarge
from packhorse.serve.rest.errors import error_body
from packhorse.serve.settings.sections import HttpSettings
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_PIPELINED = 64  # requests of one connection before the first is answered
MAX_HEADERS = 256  # each costs far more memory than its bytes


class Cuttable(Protocol):
    def cut(self, reason: str) -> None: ...


class Connections:
    """Those of all ports. Where one more finds no room, that one goes from which nothing has been
    heard for longest, among those without a request that is being answered.
    """

    def __init__(self, settings: HttpSettings, most: int) -> None:
        self.most = most
        self.header_timeout_s = settings.header_timeout_s
        self.max_header_bytes = settings.max_header_bytes
        self.stalled_client_timeout_s = settings.stalled_client_timeout_s
        self.is_draining = False
        self.count = 0
        self._open: set[Connection] = set()
        # Since when; in the order in which they began to wait, which is that of their ends.
        self._waiting: dict[Cuttable, float] = {}
        self._resting: dict[Cuttable, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        metrics.HTTP_CONNECTIONS.set_function(lambda: self.count)

    def enter(self) -> bool:
        """One more, unless there are too many that all have something to do."""
        if self.count >= self.most:
            quiet = [next(iter(kind.items())) for kind in (self._waiting, self._resting) if kind]
            if not quiet:
                metrics.CONNECTIONS_CUT.labels("full").inc()
                return False
            self._cut(min(quiet, key=lambda one: one[1])[0], "made_room")
        self.count += 1
        return True

    def leave(self) -> None:
        self.count -= 1

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)
        self.waits(connection)

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        self.works(connection)
        self.leave()

    def waits(self, one: Cuttable) -> None:
        """A header or a handshake has begun: its time runs, if it does not already."""
        if one not in self._waiting:
            self._resting.pop(one, None)
            self._waiting[one] = time.monotonic()
            if self._timer is None:
                self._look_later()

    def rests(self, one: Cuttable) -> None:
        """All that it wanted has been answered."""
        self._waiting.pop(one, None)
        self._resting[one] = time.monotonic()

    def works(self, one: Cuttable) -> None:
        """A whole header is there, or a handshake has ended."""
        self._waiting.pop(one, None)
        self._resting.pop(one, None)

    def is_open(self, connection: Connection) -> bool:
        return connection in self._open

    def drain(self) -> None:
        """From now on every answer closes its connection. Those that are idle stay: a request may
        be on its way, and its client would not know whether it was heard.
        """
        self.is_draining = True
        for connection in self._open:
            connection.drain()

    def _cut(self, one: Cuttable, reason: str) -> None:
        self.works(one)
        metrics.CONNECTIONS_CUT.labels(reason).inc()
        one.cut(reason)

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self.header_timeout_s / 4, self._look)

    def _look(self) -> None:
        self._timer = None
        oldest_s = time.monotonic() - self.header_timeout_s
        while self._waiting:
            one, since_s = next(iter(self._waiting.items()))
            if since_s > oldest_s:
                self._look_later()
                break
            self._cut(one, "slow")


class Connection(HttpToolsProtocol):
    """One connection."""

    def __init__(self, connections: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._all = connections
        self._dull_bytes = 0  # since a header began or ended, or something of a body came
        self._in_head = False
        self._is_cut = False
        self._reading: asyncio.TimerHandle | None = None
        # Requests without a whole answer, the one that is being answered first. uvicorn's own
        # `cycle` is the one that came last.
        self._unanswered: deque[RequestResponseCycle] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._all.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.closed(self)
        super().connection_lost(exc)
        self.pipeline.clear()
        for cycle in self._unanswered:  # uvicorn tells the last one alone
            cycle.disconnected = True
            cycle.message_event.set()
        self._unanswered.clear()

    def data_received(self, data: bytes) -> None:
        if self._is_cut:
            return
        self._dull_bytes += len(data)
        super().data_received(data)
        if self._is_cut or self.transport.is_closing():
            return
        if self._dull_bytes > self._all.max_header_bytes:  # of a header, or after a body's end
            self._refuse_header()
        elif self._is_idle():  # a part of a header, or of a body that nobody wants
            self._all.waits(self)

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        self._in_head, self._dull_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # it comes after a body, where uvicorn would add it to the headers
            return
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS and not self._is_cut:
            self._refuse_header()

    def on_headers_complete(self) -> None:
        self._in_head, self._dull_bytes = False, 0
        if self._is_cut:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._all.max_header_bytes:
            self._refuse_header()
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            metrics.CONNECTIONS_CUT.labels("pipelined").inc()
            self.cut("pipelined")
            return
        self._all.works(self)
        super().on_headers_complete()
        self._unanswered.append(self.cycle)
        if self._all.is_draining and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._dull_bytes = 0
        if not self._is_cut:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._dull_bytes = 0
        if self._is_cut:
            return
        super().on_message_complete()
        if self._is_idle():  # the rest of a body that was answered before it had come
            self._all.rests(self)
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        if self._unanswered:
            self._unanswered.popleft()
        super().on_response_complete()
        if self._is_idle():
            self.cycle.body = bytearray()  # else what nobody has read stays until the next request
        if self.transport.is_closing():
            self._see_read()
        elif self._is_idle() and self._in_head:  # of the next request, a part has come already
            self._unset_keepalive_if_required()
            self._all.waits(self)
        elif self._is_idle():
            self._all.rests(self)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.close()
        self._see_read()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._see_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def drain(self) -> None:
        if not self._is_idle():
            self.cycle.keep_alive = False

    def cut(self, reason: str) -> None:
        """Answer what may be answered, and close."""
        self._is_cut = True
        if self._in_head and reason == "slow":
            self._say(
                HTTPStatus.REQUEST_TIMEOUT,
                DeadlineExceeded(
                    f"The headers did not come within {self._all.header_timeout_s:g} s; send them "
                    "faster."
                ),
            )
        self._unset_keepalive_if_required()
        self._close_now()

    def _is_idle(self) -> bool:
        """Whether no request is there to be answered."""
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def _refuse_header(self) -> None:
        metrics.CONNECTIONS_CUT.labels("large").inc()
        self._is_cut = True
        self._say(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            TooLarge(
                f"The headers are above the limit of {self._all.max_header_bytes} bytes or "
                f"{MAX_HEADERS} of them; send less."
            ),
        )
        self._close_now()

    def _say(self, status: HTTPStatus, error: ServeError) -> None:
        """Unless another answer is under way."""
        if self._is_idle() and not self.transport.is_closing():
            self.transport.write(answer(status, error))

    def _close_now(self) -> None:
        """Without waiting for a client that reads nothing."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _see_read(self) -> None:
        """From now on some of what is written has to be read every now and then. Streams have the
        same in `sse`, which is told of it sooner; this is for all else, and what is closing.
        """
        if self._reading is None and self.transport.get_write_buffer_size():
            self._look_later(math.inf, times=2)

    def _look_later(self, seen_bytes: float, *, times: int = 1) -> None:
        after_s = times * self._all.stalled_client_timeout_s
        self._reading = self.loop.call_later(after_s, self._look, seen_bytes)

    def _look(self, seen_bytes: float) -> None:
        left_bytes = self.transport.get_write_buffer_size() if self._all.is_open(self) else 0
        self._reading = None
        if not left_bytes:
            return
        if left_bytes < seen_bytes:
            self._look_later(left_bytes)
            return
        metrics.CONNECTIONS_CUT.labels("unread").inc()
        self.transport.abort()


def answer(status: HTTPStatus, error: ServeError) -> bytes:
    """What is said where there is no request to answer."""
    body = error_body(error)
    retry = f"retry-after: {math.ceil(error.retry_after_s)}\r\n" if error.wire.retry else ""
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
    )
    return head.encode() + body
