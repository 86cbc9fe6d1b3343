"""From raw request to validated body: size limit, JSON, schema. Also: noticing that the client has
left.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from packhorse.serve.api.unknown_fields import UnknownFields
from packhorse.serve.api.validation import validated
from packhorse.serve.errors import Cancelled, DeadlineExceeded, Invalid, TooLarge
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.rest.compression import decoded
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


class BodyLimits:
    """How many bytes a body may have, how long it may take to come, and what all may hold together.

    One timer looks after all that are being read, because nearly every body is there already: a
    timer each would cost more than the reading.
    """

    def __init__(self, max_bytes: int, timeout_s: float, bodies: Bodies) -> None:
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self._bodies = bodies
        self._since_s: dict[asyncio.Task[Any], float] = {}
        self._given_up: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, request: Request) -> bytes:
        """Raises TooLarge, Overloaded, DeadlineExceeded, or Cancelled."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        self._since_s[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self.timeout_s / 2, self._look, loop)
        raw, caller = bytearray(), request.state.caller
        try:
            async for part in request.stream():
                raw += part
                if len(raw) > self.max_bytes:
                    raise TooLarge(
                        f"The body is above the limit of {self.max_bytes} bytes; send less."
                    )
                if part:
                    self._bodies.take(caller, len(part))
        except asyncio.CancelledError:
            if task in self._given_up and not task.uncancel():
                raise DeadlineExceeded(
                    f"The body did not come within {self.timeout_s:g} s; send it faster."
                ) from None
            raise
        except ClientDisconnect as error:
            raise Cancelled("The client closed the connection.") from error
        finally:
            del self._since_s[task]
            self._given_up.discard(task)
        return bytes(raw)

    def grew(self, request: Request, size: int) -> None:
        """Its body has so many bytes more than came. Raises Overloaded."""
        if size > 0:
            self._bodies.take(request.state.caller, size)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the reading of what has not come."""
        oldest_s = loop.time() - self.timeout_s
        for task, since_s in self._since_s.items():
            if since_s <= oldest_s and task not in self._given_up:
                self._given_up.add(task)
                task.cancel()
        self._timer = None
        if self._since_s:
            self._timer = loop.call_later(self.timeout_s / 2, self._look, loop)


async def read_body(
    request: Request,
    schema: type[Body],
    limits: BodyLimits,
    unknown: UnknownFields = "ignore",
) -> Body:
    """The request's JSON as `schema`, see `validated`. Raises as read_object."""
    return validated(await read_object(request, limits), schema, unknown)


async def read_object(request: Request, limits: BodyLimits) -> dict[str, Any]:
    """The request's JSON object. Raises TooLarge before reading it all, Overloaded when there is no
    room, DeadlineExceeded when it does not come, Cancelled, UnsupportedCoding, else Invalid.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.max_bytes:
        raise TooLarge(
            f"The body has {declared} bytes, above the limit of {limits.max_bytes}; send less."
        )
    raw = await limits.read(request)
    if coding := request.headers.get("content-encoding"):
        sent_bytes = len(raw)
        raw = decoded(raw, coding, limits.max_bytes)
        limits.grew(request, len(raw) - sent_bytes)
    try:
        # Strict, where json.loads would let surrogates pass; some clients put a mark in front.
        text = raw.decode("utf-8-sig")
        document = json.loads(text)
        if "\\ud" in text.lower():
            # An escaped half of a surrogate pair is valid JSON but no text that a tokenizer takes.
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise Invalid("The body is not valid UTF-8 text.") from error
    except ValueError as error:
        raise Invalid(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise Invalid("The body's JSON is nested too deeply.") from error
    if not isinstance(document, dict):
        raise Invalid(f"The body must be a JSON object, not {type(document).__name__}.")
    return document


async def unless_disconnected(
    receive: Receive,
    work: Awaitable[Result],
    *,
    look_every_s: float | None = None,
    look: Callable[[], None] | None = None,
) -> Result:
    """Await `work`, but cancel it when the client leaves: nothing else notices that before the
    first byte is sent. `look`, called now and then meanwhile, ends it too by raising.

    Needs the body to have been read. Raises Cancelled when the client left first.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    both = {task, watch}
    try:
        while not (
            await asyncio.wait(both, timeout=look_every_s, return_when=asyncio.FIRST_COMPLETED)
        )[0]:
            if look is not None:
                look()
    finally:
        for other in both:
            other.cancel()
        # Not `await task`: its own end, by cancellation or by an error, is looked at below.
        await asyncio.wait(both)
    if task.cancelled():
        raise Cancelled("The client closed the connection.")
    return task.result()


async def begun(
    receive: Receive, work: Awaitable[Result], within_s: float | None
) -> asyncio.Future[Result]:
    """`work` as a task: done, or still going on after within_s. Raises Cancelled when the client
    left first, which ends it.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    is_kept = False
    try:
        done, _ = await asyncio.wait(
            {task, watch}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED
        )
        is_kept = task in done or not done
    finally:
        if not is_kept:
            task.cancel()
        watch.cancel()
        await asyncio.wait({watch} if is_kept else {task, watch})
    if task.done() and task.cancelled():
        raise Cancelled("The client closed the connection.")
    return task


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
