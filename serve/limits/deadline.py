"""The deadline of a request: one timer per request, no work per token.

asyncio.timeout does not fit: the chunks of a request come from an async generator, and a timeout
around its `yield` would cancel the consumer, wherever it is at that moment. This deadline cancels
the task only while it waits for the engine; at other times it sets a flag, which the next step
checks.

Called by `pipeline`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from packhorse.serve.errors import DeadlineExceeded


class Deadline:
    """Starts with the request. Set `waiting` around every await of the engine, after `watch`."""

    __slots__ = ("_cancelled", "_cancelling", "_task", "_timeout_s", "_timer", "passed", "waiting")

    def __init__(self, timeout_s: float) -> None:
        self.passed = False
        self.waiting = False
        self._cancelled = False
        self._timeout_s = timeout_s
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)

    def __enter__(self) -> Deadline:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Raises DeadlineExceeded in the place of the cancellation that it has caused."""
        self._timer.cancel()
        if self.interrupted():
            raise self.error() from None

    def watch(self) -> None:
        """From now on the current task is the one to cancel. Raises DeadlineExceeded when no time
        is left.
        """
        self.check()
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()

    def check(self) -> None:
        """Raises DeadlineExceeded when no time is left."""
        if self.passed:
            raise self.error()

    def _expire(self) -> None:
        self.passed = True
        if self.waiting and self._task is not None:
            self._cancelled = True
            self._task.cancel()

    def interrupted(self) -> bool:
        """Whether the task was cancelled by this deadline alone. Undoes that cancellation; call it
        once, where a CancelledError arrives, or what the engine made of one.
        """
        if not self._cancelled:
            return False
        self._cancelled = False
        assert self._task is not None
        return self._task.uncancel() <= self._cancelling

    def error(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"The request took longer than its {self._timeout_s:g} s; ask for fewer tokens, or for "
            "more time with timeout_s."
        )
