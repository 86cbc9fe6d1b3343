"""One batch while it runs: which lines have no answer yet, and the journals of those that have.

`Runner` has several of these over a server's store, `packhorse batch` has one over plain files.
Neither knows more of a line than its position. What a run holds in memory is some bytes a line,
the answers that are not on disk yet, and one body for each line in flight.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from packhorse.serve.batches import lines
from packhorse.serve.batches.journal import Journal
from packhorse.serve.batches.lines import Index, Line
from packhorse.serve.batches.records import Answer, LineFault, Progress, Reply, TokenUsage
from packhorse.serve.messages import Caller

logger = logging.getLogger("packhorse.batches")

# Answers of these kinds are about the moment, not about the line: quotas and overload (Anthropic's
# word for it is 529), an engine that is being built.
WAITS = frozenset({429, 503, 529})
FAILED = 2
"""The mark of a line that has ended with an error; of others that have ended it is 1."""
MIN_WAIT_S, MAX_WAIT_S = 0.05, 60.0
# How long answers may wait to be written together. A kill loses them, and their lines run again.
GROUP_S = 0.1
AFTER_FAILURE_S = 10.0
"""How long nothing is written after the disk has refused."""


class Paths(NamedTuple):
    """The files of one run."""

    input: Path
    output: Path
    errors: Path


class InputFaulty(Exception):
    """The input file cannot be run."""

    def __init__(self, faults: list[LineFault]) -> None:
        super().__init__(faults[0].message)
        self.faults = faults


class BatchRun:
    """Made by `open_run`; used in one event loop."""

    def __init__(
        self,
        paths: Paths,
        index: Index,
        journals: tuple[Journal, Journal],
        done: bytearray,
        progress: Progress,
        usage: TokenUsage,
        max_line_bytes: int,
    ) -> None:
        self._offsets = index.offsets
        self._max_line_bytes = max_line_bytes
        self._input = paths.input.open("rb")
        self._output, self._errors = journals
        self._done = done
        self._next = 0
        self._again: deque[int] = deque()
        self.progress = progress
        self.usage = usage
        self._flying: set[int] = set()
        self.wrote: Callable[[int], None] = lambda size: None
        """Told the bytes of each group that was written."""
        self.took: Callable[[float, int], None] = lambda seconds, tokens: None
        """Told the seconds and the tokens of each answer."""
        self._unwritten: list[tuple[bytes, bool]] = []
        self._writing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[bool] | None = None
        self._is_closed = False
        self.blocked_until_s = 0.0
        """No line may be taken before, by time.monotonic(): the disk has refused."""

    def take(self) -> int | None:
        """The position of a line that has no answer and is not in flight. None: there is none."""
        if self._again:
            position = self._again.popleft()
        else:
            while self._next < len(self._done) and self._done[self._next]:
                self._next += 1
            if self._next >= len(self._done):
                return None
            position = self._next
            self._next += 1
        self._flying.add(position)
        return position

    def give_back(self, position: int) -> None:
        """A line that was taken has ended; if it has no answer, it is taken again. Safe to call
        twice.
        """
        if position in self._flying:
            self._flying.remove(position)
            if not self._done[position]:
                self._again.appendleft(position)

    def has_failed(self, position: int) -> bool:
        """Whether the line has ended with an error, in this run."""
        return self._done[position] == FAILED

    @property
    def is_done(self) -> bool:
        """Whether every line has an answer or an error; those may still have to be flushed."""
        return self.progress.completed + self.progress.failed >= self.progress.total

    async def attempt(self, position: int, caller: Caller, answer: Answer) -> float | None:
        """Make the call of a line that was taken, and keep what it comes to: None. A line that is
        refused for the moment is given back, and the seconds to wait before another are returned.
        Cancelled, the line is given back too. Raises OSError when the input cannot be read.
        """
        try:
            line = await asyncio.to_thread(self._line, position)
            request_id = uuid.uuid4().hex
            if message := lines.refusal(line):
                self._keep(position, lines.refused(line.custom_id, request_id, message), None)
                return None
            try:
                body = json.dumps(line.body, ensure_ascii=False, separators=(",", ":")).encode(
                    "utf-8", "surrogatepass"
                )
            except RecursionError:
                message = "body: nested too deeply."
                self._keep(position, lines.refused(line.custom_id, request_id, message), None)
                return None
            began_s = time.monotonic()
            reply = await answer(line.url, body, caller, request_id)
            took_s = time.monotonic() - began_s
            if reply.status in WAITS:
                return _wait_s(reply)
            kept, is_error = lines.answered(line.custom_id, request_id, reply)
            tokens = self._keep(position, kept, None if is_error else reply)
            if not is_error:
                self.took(took_s, tokens)
            return None
        finally:
            self.give_back(position)

    def _line(self, position: int) -> Line:
        """Blocks."""
        start = self._offsets[position]
        raw = os.pread(self._input.fileno(), self._max_line_bytes + 1, start).partition(b"\n")[0]
        found = lines.parse(raw, position + 1, None)
        if isinstance(found, LineFault):  # the file has changed since it was checked
            raise OSError(f"line {position + 1} of the input file cannot be read any more")
        return found

    def _keep(self, position: int, line: bytes, reply: Reply | None) -> int:
        """Count a line's answer (an error when there is no reply), and write it soon. Returns its
        tokens.
        """
        before = self.usage.output_tokens
        self._done[position] = 1 if reply is not None else FAILED
        if reply is None:
            self.progress.failed += 1
        else:
            self.progress.completed += 1
            self.usage.add(_usage_in(reply.body))
        self._unwritten.append((line, reply is None))
        self._flush_soon()
        return self.usage.output_tokens - before

    def _flush_soon(self) -> None:
        if self._timer is None and not self._is_closed:
            wait_s = max(GROUP_S, self.blocked_until_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._begin_flush)

    def _begin_flush(self) -> None:
        self._timer = None
        self._flushing = asyncio.create_task(self.flush())

    async def flush(self) -> bool:
        """Write what there is. False: the disk has refused, and it is tried again later."""
        async with self._writing:
            group, self._unwritten = self._unwritten, []
            if not group:
                return True
            left = await asyncio.to_thread(self._write, group)
            if left:
                self._unwritten = left + self._unwritten
                self.blocked_until_s = time.monotonic() + AFTER_FAILURE_S
                self._flush_soon()
                return False
            self.wrote(sum(len(line) for line, _ in group))
            return True

    def _write(self, group: list[tuple[bytes, bool]]) -> list[tuple[bytes, bool]]:
        """Blocks. Returns what the disk did not take."""
        left: list[tuple[bytes, bool]] = []
        for journal, is_error in ((self._output, False), (self._errors, True)):
            mine = [line for line, error in group if error is is_error]
            try:
                if mine:
                    journal.write(mine)
            except OSError as error:
                logger.warning("Answers of a batch cannot be written: %s", error.strerror)
                left += [(line, is_error) for line in mine]
        return left

    async def give_up_rest(self, code: str, message: str) -> bool:
        """Write an error for each line without an answer. No line may be in flight. False: the disk
        has refused.
        """
        for position in range(len(self._done)):
            if not self._done[position]:
                line = await asyncio.to_thread(self._line, position)
                entry = lines.not_run(line.custom_id, uuid.uuid4().hex, code, message)
                self._keep(position, entry, None)
                if len(self._unwritten) >= 1000 and not await self.flush():
                    return False
        return await self.flush()

    @property
    def bytes(self) -> int:
        """Bytes of both journals."""
        return self._output.size + self._errors.size

    async def close(self) -> None:
        """Write what there is, and let the files go. No line is in flight. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self.flush()
        self._input.close()
        self._output.close()
        self._errors.close()


async def run_all(
    run: BatchRun, caller: Caller, answer: Answer, *, at_once: int, moved: Callable[[], None]
) -> None:
    """Run every line of a batch that has the engine to itself, and write all answers. `moved` is
    called after each line. Raises OSError.
    """

    async def work() -> None:
        while True:
            blocked_s = run.blocked_until_s - time.monotonic()
            if blocked_s > 0:  # what is answered meanwhile would only wait in memory
                await asyncio.sleep(blocked_s)
                continue
            if (position := run.take()) is None:
                return
            wait_s = await run.attempt(position, caller, answer)
            if wait_s is not None:
                await asyncio.sleep(wait_s)
            moved()

    async with asyncio.TaskGroup() as workers:
        for _ in range(at_once):
            workers.create_task(work())
    while not await run.flush():  # noqa: ASYNC110 the disk has no event
        await asyncio.sleep(AFTER_FAILURE_S)


def open_run(
    paths: Paths, endpoint: str | None, *, max_lines: int, max_line_bytes: int
) -> BatchRun:
    """Check the input file and find out what is answered already. Blocks. Raises InputFaulty, or
    OSError.
    """
    index = Index(paths.input, endpoint, max_lines=max_lines, max_bytes=max_line_bytes)
    if index.faults:
        raise InputFaulty(index.faults)
    done = bytearray(len(index.offsets))
    progress, usage = Progress(total=len(done)), TokenUsage()

    def count(raw: bytes) -> None:
        try:
            document: dict[str, Any] = json.loads(raw)
        except ValueError:  # the disk has lost it, so its line runs again
            return
        position = index.position(document["custom_id"])
        if position is not None and not done[position]:
            done[position] = 1
            lines.count(document, progress, usage)

    journals = Journal(paths.output), Journal(paths.errors)
    for journal in journals:
        journal.read(count)
    index.forget_keys()
    return BatchRun(paths, index, journals, done, progress, usage, max_line_bytes)


def _usage_in(body: bytes) -> object:
    try:
        document = json.loads(body)
    except ValueError:
        return None
    return document.get("usage") if isinstance(document, dict) else None


def _wait_s(reply: Reply) -> float:
    try:
        asked = float(reply.headers.get("retry-after", ""))
    except ValueError:
        asked = 1.0
    return min(max(asked, MIN_WAIT_S), MAX_WAIT_S)
