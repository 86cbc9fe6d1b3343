"""HTTP connections: limits that uvicorn lacks, and two things that clients do and it does not
expect.

Limits: how many connections, how long a header may take and how large it may be, how long a client
may read nothing. Unexpected: an offer of another protocol (`Upgrade: h2c`, which Java's client puts
on every request), and a client that closes its half of the connection after its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from packhorse.serve.errors import DeadlineExceeded, ServeError, TooLarge
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.rest.errors import raw_error_response
from packhorse.serve.rest.sse import HEARTBEAT
from packhorse.serve.settings.http import HttpSettings

MAX_PIPELINED = 64  # requests of one connection before the first is answered
MAX_HEADERS = 256  # each costs far more memory than its bytes
# The first byte of struct tcp_info: Linux' number for a connection that a reset has ended.
TCP_CLOSE = 7
LOOK_FIRST_S, LOOK_EVERY_S = 0.05, 0.25
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
COMMENT = b"%x\r\n%s\r\n" % (len(HEARTBEAT), HEARTBEAT)  # a chunk of a chunked response
UPGRADE_HEADERS = {b"upgrade", b"http2-settings"}


class Cuttable(Protocol):
    def cut(self, reason: str) -> None: ...


class Connections:
    """The connections of all ports. At the limit, a new one takes the place of the one that has
    been silent for longest among those without a request in progress.
    """

    def __init__(
        self, settings: HttpSettings, most: int, metrics: ServerMetrics | None = None
    ) -> None:
        self.metrics = metrics or ServerMetrics()
        self.most = most
        self.header_timeout_s = settings.header_timeout_s
        self.max_header_bytes = settings.max_header_bytes
        self.stalled_client_timeout_s = settings.stalled_client_timeout_s
        self.is_draining = False
        self.count = 0
        self._open: set[Connection] = set()
        # Connection -> since when, in the order in which the waiting began.
        self._waiting: dict[Cuttable, float] = {}
        self._resting: dict[Cuttable, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.metrics.http_connections.set_function(lambda: self.count)

    def enter(self) -> bool:
        """Take one more; False when there are too many and all have a request in progress."""
        if self.count >= self.most:
            quiet = [next(iter(kind.items())) for kind in (self._waiting, self._resting) if kind]
            if not quiet:
                self.metrics.connections_cut.labels("full").inc()
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
        """A header or a handshake has begun: its time runs from here, or from before."""
        if one not in self._waiting:
            self._resting.pop(one, None)
            self._waiting[one] = time.monotonic()
            if self._timer is None:
                self._look_later()

    def rests(self, one: Cuttable) -> None:
        """All of its requests have been answered."""
        self._waiting.pop(one, None)
        self._resting[one] = time.monotonic()

    def works(self, one: Cuttable) -> None:
        """A header is complete, or a handshake has ended."""
        self._waiting.pop(one, None)
        self._resting.pop(one, None)

    def is_open(self, connection: Connection) -> bool:
        return connection in self._open

    def drain(self) -> None:
        """From now on every answer closes its connection. Idle connections stay open: a request may
        be on its way, and its client would not know whether it was received.
        """
        self.is_draining = True
        for connection in self._open:
            connection.drain()

    def _cut(self, one: Cuttable, reason: str) -> None:
        self.works(one)
        self.metrics.connections_cut.labels(reason).inc()
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


class ConnectionLost:
    """Whether a request's connection is gone, for whoever works on the request."""

    __slots__ = ("_is_lost", "_tell")

    def __init__(self) -> None:
        self._is_lost = False
        self._tell: Callable[[], None] | None = None

    def tell(self, callback: Callable[[], None] | None) -> None:
        """Call it when the connection is lost, at once if it is already; None: nobody any more."""
        self._tell = callback
        if self._is_lost and callback is not None:
            asyncio.get_running_loop().call_soon(self._tell_late, callback)

    def _tell_late(self, callback: Callable[[], None]) -> None:
        if self._tell == callback:
            callback()

    def happened(self) -> None:
        self._is_lost = True
        if self._tell is not None:
            self._tell()


class Connection(HttpToolsProtocol):
    """One connection: uvicorn's protocol, with its callbacks extended.

    An offer to upgrade is answered as if it had not been made (RFC 9110, section 7.8), with the
    request's body. A client that has closed its half of the connection gets its answer.
    """

    def __init__(self, connections: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._all = connections
        # Bytes since a header began or ended, or a part of a body arrived.
        self._header_bytes = 0
        self._in_head = False
        self._is_cut = False
        self._reading: asyncio.TimerHandle | None = None
        # Requests without a complete answer; the first is being answered. uvicorn's own `cycle` is
        # the last.
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._data = b""
        self._offers_upgrade = False
        self._looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._all.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self._all.closed(self)
        super().connection_lost(exc)
        self.pipeline.clear()
        for cycle in self._unanswered:  # uvicorn tells only the last one
            cycle.disconnected = True
            cycle.message_event.set()
            cycle.scope["state"]["connection_lost"].happened()
        self._unanswered.clear()

    def data_received(self, data: bytes) -> None:
        if self._is_cut:
            return
        self._header_bytes += len(data)
        self._data = data  # for an offer to upgrade
        super().data_received(data)
        self._data = b""
        if self._is_cut or self.transport.is_closing():
            return
        if self._header_bytes > self._all.max_header_bytes:  # in a header, or after a body's end
            self._refuse_header()
        elif self._is_idle():  # a part of a header, or of a body that nobody reads
            self._all.waits(self)

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        self._in_head, self._header_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer, which uvicorn would add to the headers
            return
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS and not self._is_cut:
            self._refuse_header()

    def on_headers_complete(self) -> None:
        # After an offer the parser takes what follows for the other protocol, not for the body.
        upgrades = self.parser.should_upgrade()
        self._offers_upgrade = upgrades and self.parser.get_method() != b"CONNECT"
        if self._offers_upgrade:
            return
        self._in_head, self._header_bytes = False, 0
        if self._is_cut:
            return
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._all.max_header_bytes:
            self._refuse_header()
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._all.metrics.connections_cut.labels("pipelined").inc()
            self.cut("pipelined")
            return
        self._all.works(self)
        super().on_headers_complete()
        self.scope["state"]["connection_lost"] = ConnectionLost()
        self._unanswered.append(self.cycle)
        if self._all.is_draining and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        if not self._is_cut:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        self._header_bytes = 0
        if self._is_cut:
            return
        super().on_message_complete()
        if self._is_idle():  # the rest of a body that was answered before it arrived
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
            self.cycle.body = bytearray()  # else an unread body stays until the next request
        if self.transport.is_closing():
            self._watch_reading()
        elif self._is_idle() and self._in_head:  # a part of the next request is there
            self._unset_keepalive_if_required()
            self._all.waits(self)
        elif self._is_idle():
            self._all.rests(self)

    def timeout_keep_alive_handler(self) -> None:
        self.transport.close()
        self._watch_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def drain(self) -> None:
        if not self._is_idle():
            self.cycle.keep_alive = False

    def cut(self, reason: str) -> None:
        """Close, after an answer where one is possible."""
        self._is_cut = True
        if self._in_head and reason == "slow":
            self._answer(
                HTTPStatus.REQUEST_TIMEOUT,
                DeadlineExceeded(
                    f"The headers did not come within {self._all.header_timeout_s:g} s; send them "
                    "faster."
                ),
            )
        self._unset_keepalive_if_required()
        self._close_now()

    def _is_idle(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def _refuse_header(self) -> None:
        self._all.metrics.connections_cut.labels("large").inc()
        self._is_cut = True
        self._answer(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            TooLarge(
                f"The headers are above the limit of {self._all.max_header_bytes} bytes or "
                f"{MAX_HEADERS} of them; send less."
            ),
        )
        self._close_now()

    def _answer(self, status: HTTPStatus, error: ServeError) -> None:
        """Answer without a request, unless another answer is in progress."""
        if self._is_idle() and not self.transport.is_closing():
            self.transport.write(raw_error_response(status, error))

    def _close_now(self) -> None:
        """Close without waiting for a client that reads nothing."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _watch_reading(self) -> None:
        """From now on the client must read some of what is written within each timeout. For answers
        that are no streams, and for closing connections; sse.EventStream does it for streams.
        """
        if self._reading is None and self.transport.get_write_buffer_size():
            self._check_reading_later(math.inf, times=2)

    def _check_reading_later(self, seen_bytes: float, *, times: int = 1) -> None:
        after_s = times * self._all.stalled_client_timeout_s
        self._reading = self.loop.call_later(after_s, self._check_reading, seen_bytes)

    def _check_reading(self, seen_bytes: float) -> None:
        left_bytes = self.transport.get_write_buffer_size() if self._all.is_open(self) else 0
        self._reading = None
        if not left_bytes:
            return
        if left_bytes < seen_bytes:
            self._check_reading_later(left_bytes)
            return
        self._all.metrics.connections_cut.labels("unread").inc()
        self.transport.abort()

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn calls this while it handles the parser's exception. Parse the request again
        without the offer.
        """
        offer = sys.exception()
        while isinstance(offer, httptools.HttpParserUpgrade) and self._offers_upgrade:
            if self._is_cut or self.transport.is_closing():
                return
            self._data = self._without_offer() + self._data[offer.args[0] :]
            self._offers_upgrade, offer = False, None
            self.parser = httptools.HttpRequestParser(self)
            with contextlib.suppress(AttributeError):  # as uvicorn does
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            try:
                self.parser.feed_data(self._data)
            except httptools.HttpParserUpgrade as another:  # in the next request, sent together
                offer = another
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")

    def _without_offer(self) -> bytes:
        version = b" HTTP/" + self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + version]
        for name, value in self.headers:
            if name in UPGRADE_HEADERS:
                continue
            if name == b"connection":
                tokens = (token.strip() for token in value.split(b","))
                value = b", ".join(
                    token for token in tokens if token.lower() not in UPGRADE_HEADERS
                )
                if not value:
                    continue
            lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client has closed its half: it waits for its answer, or it has left. One that has
        left answers the next bytes with a reset. So send bytes that every client skips, and look
        for the reset until the answer is complete. Where that is not possible, close the
        connection.
        """
        can_wait = (
            bool(self._unanswered)
            and not self.cycle.more_body
            and self.scope.get("http_version") == "1.1"
            and self.scheme == "http"
        )
        if not can_wait or self._tcp_state() in (None, TCP_CLOSE):
            return None
        self.cycle.keep_alive = False
        running = self._unanswered[0]
        if not running.response_started:
            self.transport.write(CONTINUE)
        elif running.chunked_encoding and running.scope["state"].get("is_event_stream"):
            self.transport.write(COMMENT)  # writes are whole chunks
        self._looking = self.loop.call_later(LOOK_FIRST_S, self._look_whether_left)
        return True

    def _look_whether_left(self) -> None:
        self._looking = None
        if self.transport.is_closing():
            return
        if self._tcp_state() == TCP_CLOSE:
            self.transport.abort()
        else:
            self._looking = self.loop.call_later(LOOK_EVERY_S, self._look_whether_left)

    def _tcp_state(self) -> int | None:
        """The connection's TCP state; None where the system does not say."""
        taken: socket.socket | None = self.transport.get_extra_info("socket")
        if taken is None or not sys.platform.startswith("linux"):
            return None
        try:
            told = taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        except OSError:
            return None
        return struct.unpack("B", told)[0] if told else None
