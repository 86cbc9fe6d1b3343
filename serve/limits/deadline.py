"""The end of a request's time: one timer a request, nothing per token.

Not asyncio.timeout: a request's chunks come from an async generator, and a timeout around its
`yield` would cancel the caller, wherever that is at the moment. Here the task is cancelled only
while it waits for the engine; at any other moment a flag is set, which the next step looks at.

Called by `service`.
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

    def watch(self) -> None:
        """The running task is the one that waits for the engine from now on. Raises
        DeadlineExceeded when there is no time left.
        """
        self.check()
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()

    def check(self) -> None:
        """Raises DeadlineExceeded when there is no time left."""
        if self.passed:
            raise self.error()

    def _expire(self) -> None:
        self.passed = True
        if self.waiting and self._task is not None:
            self._cancelled = True
            self._task.cancel()

    def interrupted(self) -> bool:
        """Whether a CancelledError, or whatever the engine made of it, is this deadline's alone. If
        so it is undone; call it once.
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

    def stop(self) -> None:
        """The request is over."""
        self._timer.cancel()
