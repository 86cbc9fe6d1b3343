"""How messages are read: after it is known who calls, one reservation each, within a time.

gRPC's own unary handlers get their message whole, before any code of ours has run: strangers could
make the server hold as much as they send. To the wire a unary call is a stream of one message, so
all methods here are registered as if their requests were streams, and read when they may be.
Until then gRPC holds no more of a call than one flow-control window.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from packhorse.serve.errors import Cancelled, DeadlineExceeded, Invalid
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.messages import Caller
from packhorse.serve.settings.sections import RpcSettings

# gRPC refuses beyond this, by the length that is written before a message; up to it, we do, with a
# message that says more.
ABOVE_LIMIT_BYTES = 2**20
# Messages being read at once of calls that need no key (health, reflection).
OPEN_READS = 16

Context = Any  # grpc.aio.ServicerContext; grpc has no types


class Reading:
    """Of one server."""

    def __init__(self, settings: RpcSettings, bodies: Bodies) -> None:
        self.max_bytes = settings.max_message_bytes + ABOVE_LIMIT_BYTES
        """What gRPC is to take of one message."""
        self._timeout_s = settings.stalled_client_timeout_s
        self._bodies = bodies
        self._open: dict[asyncio.Timeout, None] = {}

    async def of_caller(self, context: Context, caller: Caller) -> bytes:
        """The message of a call. Raises Overloaded, DeadlineExceeded, Cancelled, or Invalid when
        there is none.
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
        """The next message, or EOF. Few are read at once: whichever has been at it for longest
        makes room, so that a message that is there already always gets through.
        """
        while len(self._open) >= OPEN_READS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.reschedule(0)  # long ago
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
