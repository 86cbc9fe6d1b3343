"""A limit on the bytes that calls in progress hold: bodies over HTTP, messages over gRPC. It is a
count, which refuses a call before the memory runs out.

`rest` and `rpc` use it, in the event loop only. A call holds its bytes until its task has ended,
because the prompt that was made of its body lives as long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from packhorse.serve.errors import Overloaded
from packhorse.serve.messages import Caller
from packhorse.serve.metrics import ModelMetrics, ServerMetrics

# The share of the limit that the calls of one key may hold, so that it cannot exclude the others.
KEY_SHARE = 0.5
# Small messages hold their bytes for a millisecond; after so long a wait it is an overload.
MAX_WAIT_S = 5.0
RETRY_S = 1.0


class _Held:
    """The bytes that one task holds, and its key."""

    __slots__ = ("key", "size")

    def __init__(self, key: str) -> None:
        self.key = key
        self.size = 0


class Bodies:
    """The bytes that all calls of one server hold."""

    def __init__(
        self,
        max_bytes: int,
        *,
        metrics: ServerMetrics | None = None,
        model_metrics: ModelMetrics | None = None,
    ) -> None:
        """`metrics` counts the bytes, `model_metrics` the refusals."""
        self._refusals = (model_metrics or ModelMetrics()).admission_refusals
        self.max_bytes = max_bytes
        self._max_key_bytes = int(max_bytes * KEY_SHARE)
        self.held = 0
        self._of_key: dict[str, int] = {}
        self._of_task: dict[asyncio.Task[Any], _Held] = {}
        self._waiting: dict[str, deque[tuple[_Held, int, asyncio.Future[None]]]] = {}
        (metrics or ServerMetrics()).body_bytes.set_function(lambda: self.held)

    def take(self, caller: Caller, size: int) -> None:
        """Count these bytes for the current task. Raises Overloaded."""
        held = self._mine(caller)
        if not self._fits(held, size):
            raise self._refusal(caller, size)
        self._count(held, size)

    async def reserve(self, caller: Caller, size: int) -> None:
        """Like `take`, for bytes that may arrive; waits up to MAX_WAIT_S. Raises Overloaded."""
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
            # If they were granted meanwhile, the end of the task gives them back.
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
        """A single call always fits, however large: its own size has another limit."""
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
        """Grant waiting calls their bytes, in the order of arrival within each key."""
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
        self._refusals.labels("body_bytes").inc()
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
