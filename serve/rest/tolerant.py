"""What clients do on a connection that HTTP allows and servers often trip over: offering another
protocol (`Upgrade: h2c`, which Java's own client puts on every request), and closing their half
after asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from typing import Any

import httptools
from packhorse.serve.rest.connections import Connection
from packhorse.serve.rest.sse import HEARTBEAT

# Of struct tcp_info, its first byte; Linux' numbers for a connection that a reset has ended.
TCP_CLOSE = 7
LOOK_FIRST_S, LOOK_EVERY_S = 0.05, 0.25
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
COMMENT = b"%x\r\n%s\r\n" % (len(HEARTBEAT), HEARTBEAT)
OFFERS = {b"upgrade", b"http2-settings"}


class TolerantConnection(Connection):
    """Answers an offer to upgrade as if it had not been made (RFC 9110, section 7.8), with its
    body; and a client that has closed its half of the connection, and waits.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._data = b""
        self._is_offer = False
        self._looking: asyncio.TimerHandle | None = None

    # Offers

    def data_received(self, data: bytes) -> None:
        self._data = data
        super().data_received(data)
        self._data = b""

    def on_headers_complete(self) -> None:
        # A parser takes what follows for the other protocol's, and not for the body.
        self._is_offer = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if not self._is_offer:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._is_offer:
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Called with the parser's exception at hand: read the request again without the offer."""
        offer = sys.exception()
        while isinstance(offer, httptools.HttpParserUpgrade) and self._is_offer:
            if self._is_cut or self.transport.is_closing():
                return
            self._data = self._without_offer() + self._data[offer.args[0] :]
            self._is_offer, offer = False, None
            self.parser = httptools.HttpRequestParser(self)
            with contextlib.suppress(AttributeError):  # as uvicorn does
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            try:
                self.parser.feed_data(self._data)
            except httptools.HttpParserUpgrade as another:  # of the next request, sent together
                offer = another
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")

    def _without_offer(self) -> bytes:
        version = b" HTTP/" + self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + version]
        for name, value in self.headers:
            if name in OFFERS:
                continue
            if name == b"connection":
                tokens = (token.strip() for token in value.split(b","))
                value = b", ".join(token for token in tokens if token.lower() not in OFFERS)
                if not value:
                    continue
            lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    # A half that is closed

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that has left looks the same at first: sent something, its system answers with a
        reset. So it is sent what every client passes over, and then looked at until the answer is
        there. Where that cannot be done, the connection is closed.
        """
        can_wait = (
            bool(self._unanswered)
            and not self.cycle.more_body
            and self.scope.get("http_version") == "1.1"
            and self.scheme == "http"
        )
        if not can_wait or self._state() in (None, TCP_CLOSE):
            return None
        self.cycle.keep_alive = False
        running = self._unanswered[0]
        if not running.response_started:
            self.transport.write(CONTINUE)
        elif running.chunked_encoding and running.scope["state"].get("is_event_stream"):
            self.transport.write(COMMENT)  # what is written, is written in whole chunks
        self._looking = self.loop.call_later(LOOK_FIRST_S, self._look_whether_left)
        return True

    def _look_whether_left(self) -> None:
        self._looking = None
        if self.transport.is_closing():
            return
        if self._state() == TCP_CLOSE:
            self.transport.abort()
        else:
            self._looking = self.loop.call_later(LOOK_EVERY_S, self._look_whether_left)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def _state(self) -> int | None:
        """TCP's state of the connection; None where the system does not tell."""
        taken: socket.socket | None = self.transport.get_extra_info("socket")
        if taken is None or not sys.platform.startswith("linux"):
            return None
        try:
            told = taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        except OSError:
            return None
        return struct.unpack("B", told)[0] if told else None
