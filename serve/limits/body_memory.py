"""How many bytes the calls in progress hold: bodies over HTTP, messages over gRPC. Nothing more
than a count, which says no before memory does.

Owned by `admission`; asked by `rest/body` and `rpc/calls`, in the event loop only. What a call
takes is its own until its task has ended: the prompt that was made of a body lives as long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from packhorse.serve import metrics
from packhorse.serve.errors import Overloaded
from packhorse.serve.messages import Caller

# Of all there is: what the calls of one key may hold, so that one key cannot shut out the others.
KEY_SHARE = 0.5
# Small messages come and go within a millisecond; what has found no room by then is an overload.
MAX_WAIT_S = 5.0
RETRY_S = 1.0


class _Held:
    """What one task holds, and for which key."""

    __slots__ = ("key", "size")

    def __init__(self, key: str) -> None:
        self.key = key
        self.size = 0


class Bodies:
    """The bytes of all calls of one server."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._max_key_bytes = int(max_bytes * KEY_SHARE)
        self.held = 0
        self._of_key: dict[str, int] = {}
        self._of_task: dict[asyncio.Task[Any], _Held] = {}
        self._waiting: dict[str, deque[tuple[_Held, int, asyncio.Future[None]]]] = {}
        metrics.BODY_BYTES.set_function(lambda: self.held)

    def take(self, caller: Caller, size: int) -> None:
        """Count so many bytes more for the current task. Raises Overloaded."""
        held = self._mine(caller)
        if not self._fits(held, size):
            raise self._refusal(caller, size)
        self._count(held, size)

    async def reserve(self, caller: Caller, size: int) -> None:
        """Like `take`, for what may come; waits for room a little while. Raises Overloaded."""
        held = self._mine(caller)
        if self._fits(held, size) and caller.name not in self._waiting:
            self._count(held, size)
            return
        waiting = self._waiting.setdefault(caller.name, deque())
        turn = asyncio.get_running_loop().create_future()
        waiting.append((held, size, turn))
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await turn
        except TimeoutError:
            # Had it been its turn meanwhile, its task's end gives that back.
            raise self._refusal(caller, size) from None
        finally:
            if self._waiting.get(caller.name) is waiting and not turn.done():
                turn.cancel()
            self._let_in()

    def shrink(self, size: int) -> None:
        """The current task holds no more than this."""
        held = self._of_task.get(_task())
        if held is not None and held.size > size:
            self._count(held, size - held.size)
            self._let_in()

    def _mine(self, caller: Caller) -> _Held:
        task = _task()
        held = self._of_task.get(task)
        if held is None:
            held = self._of_task[task] = _Held(caller.name)
            task.add_done_callback(self._ended)
        return held

    def _fits(self, held: _Held, size: int) -> bool:
        """One is always taken, however large: its own limit is another one."""
        of_key = self._of_key.get(held.key, 0)
        if of_key > held.size and of_key + size > self._max_key_bytes:
            return False
        return self.held == held.size or self.held + size <= self.max_bytes

    def _count(self, held: _Held, size: int) -> None:
        held.size += size
        self.held += size
        of_key = self._of_key.get(held.key, 0) + size
        if of_key:
            self._of_key[held.key] = of_key
        else:
            self._of_key.pop(held.key, None)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        held = self._of_task.pop(task)
        self._count(held, -held.size)
        if self._waiting:
            self._let_in()

    def _let_in(self) -> None:
        """Whose turn it is now: each key's own queue, in the order in which they came."""
        for key in list(self._waiting):
            queue = self._waiting[key]
            while queue:
                held, size, turn = queue[0]
                if not turn.done():
                    if not self._fits(held, size):
                        break
                    self._count(held, size)
                    turn.set_result(None)
                queue.popleft()
            if not queue:
                del self._waiting[key]

    def _refusal(self, caller: Caller, size: int) -> Overloaded:
        metrics.ADMISSION_REFUSALS.labels("body_bytes").inc()
        of_key = self._of_key.get(caller.name, 0)
        return Overloaded(
            f"Calls in progress hold {self.held} bytes of requests, {of_key} of them this key's, "
            f"and {size} more would be above the limit of {self.max_bytes}, {self._max_key_bytes} "
            "for one key; try again soon, or send less at once.",
            retry_after_s=RETRY_S,
        )


def _task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
