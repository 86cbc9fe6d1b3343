"""Takes connections from listening sockets: within the limit, with TLS or without.

Called by `listen`; what becomes of a connection is in `connections`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from http import HTTPStatus

from packhorse.serve.errors import Unavailable
from packhorse.serve.rest.connections import Connection, Connections, answer

logger = logging.getLogger("packhorse.http")

ACCEPTS_AT_ONCE = 64  # before others have a turn in the event loop
ACCEPT_AGAIN_S = 1.0  # after the system had no file descriptor left
SHUTDOWN_S = 1.0  # for the other side's last word of TLS


class Acceptor:
    """Takes the connections of one listening socket; uvicorn closes it like asyncio's Server."""

    def __init__(
        self,
        listener: socket.socket,
        connections: Connections,
        make: Callable[[], Connection],
        certificate: ssl.SSLContext | None,
    ) -> None:
        self._listener = listener
        self._connections = connections
        self._make = make
        self._certificate = certificate
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[Handshake] = set()
        self._again: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
        if self._again is not None:
            self._again.cancel()
        for handshake in list(self._handshakes):
            handshake.cut("closing")

    async def wait_closed(self) -> None:
        """Nothing is left to wait for."""

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                peer, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("No connection can be taken: %s", error.strerror)
                self._loop.remove_reader(self._listener)
                self._again = self._loop.call_later(ACCEPT_AGAIN_S, self._accept_again)
                return
            peer.setblocking(False)
            if self._connections.enter():
                Handshake(peer, self._connections, self._handshakes).begin(
                    self._make, self._certificate
                )
            else:
                _turn_away(peer, can_say_why=self._certificate is None)

    def _accept_again(self) -> None:
        self._again = None
        self._loop.add_reader(self._listener, self._accept)


class Handshake:
    """A connection until it can be spoken on: with TLS, until both sides have agreed."""

    def __init__(
        self, peer: socket.socket, connections: Connections, running: set[Handshake]
    ) -> None:
        self._peer = peer
        self._connections = connections
        self._running = running
        self._task: asyncio.Task[None] | None = None
        self._made: Connection | None = None

    def begin(self, make: Callable[[], Connection], certificate: ssl.SSLContext | None) -> None:
        def protocol() -> Connection:
            self._made = make()
            return self._made

        self._running.add(self)
        self._task = asyncio.create_task(self._run(protocol, certificate))
        self._task.add_done_callback(self._ended)
        if certificate is not None:
            self._connections.waits(self)

    def cut(self, reason: str) -> None:
        assert self._task is not None
        self._task.cancel()

    async def _run(
        self, protocol: Callable[[], Connection], certificate: ssl.SSLContext | None
    ) -> None:
        with contextlib.suppress(OSError):  # ssl.SSLError is one
            self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                protocol,
                self._peer,
                ssl=certificate,
                # Whoever is cut off may not answer, and would keep its place until then.
                ssl_shutdown_timeout=SHUTDOWN_S if certificate else None,
            )

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._running.discard(self)
        self._connections.works(self)
        if self._made is None or self._made.transport is None:  # else it says itself when it goes
            self._peer.close()
            self._connections.leave()


def _turn_away(peer: socket.socket, *, can_say_why: bool) -> None:
    try:
        if can_say_why:
            peer.send(
                answer(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    Unavailable(
                        "The server has as many connections as it takes; try again soon.",
                        retry_after_s=1,
                    ),
                )
            )
            # What is unread when a socket is closed makes the kernel reset it: the answer is lost.
            peer.recv(2**16)
    except OSError:
        pass
    finally:
        peer.close()
