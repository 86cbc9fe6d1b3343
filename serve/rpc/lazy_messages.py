"""Reads request messages after the caller is identified, with a memory reservation and a timeout.

A unary handler of gRPC gets its whole message before any code of ours runs, so strangers could make
the server hold as much as they send. On the wire a unary call is a stream of one message: all
methods are therefore registered as request streams, and read once the call is admitted. Until then
gRPC holds no more of a call than one flow-control window.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from packhorse.serve.errors import Cancelled, DeadlineExceeded, Invalid
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.messages import Caller
from packhorse.serve.settings.rpc import RpcSettings

# gRPC itself refuses messages that are this much above the limit, by their length prefix; the ones
# between are refused here, with a better error.
ABOVE_LIMIT_BYTES = 2**20
# How many messages of calls without a key (health, reflection) are read at once.
OPEN_READS = 16

Context = Any  # grpc.aio.ServicerContext; grpc has no types


class MessageReader:
    """Reads the request messages of one server."""

    def __init__(self, settings: RpcSettings, bodies: Bodies) -> None:
        self.max_bytes = settings.max_message_bytes + ABOVE_LIMIT_BYTES
        """gRPC's own limit on a message."""
        self._timeout_s = settings.stalled_client_timeout_s
        self._bodies = bodies
        self._open: dict[asyncio.Timeout, None] = {}

    async def of_caller(self, context: Context, caller: Caller) -> bytes:
        """The message of an identified caller. Raises Overloaded, DeadlineExceeded, Cancelled, or
        Invalid when there is none.
        """
        await self._bodies.reserve(caller, self.max_bytes)
        try:
            async with asyncio.timeout(self._timeout_s):
                raw = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(
                f"The message did not come within {self._timeout_s:g} s; send it faster."
            ) from None
        if raw is grpc.aio.EOF:
            if context.cancelled():
                raise Cancelled("The client cancelled the call.")
            raise Invalid("The call has no message; send one.")
        self._bodies.shrink(len(raw))
        return bytes(raw)

    async def of_anybody(self, context: Context) -> Any:
        """The next message of a call without a key, or EOF. At most OPEN_READS are read at once;
        the one that has waited longest is given up for a new one, so that a message that has
        already arrived is always read.
        """
        while len(self._open) >= OPEN_READS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.reschedule(0)  # expires now
        try:
            async with asyncio.timeout(self._timeout_s) as mine:
                self._open[mine] = None
                try:
                    return await context.read()
                finally:
                    self._open.pop(mine, None)
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, "The message did not come in time."
            )
