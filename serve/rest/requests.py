"""From a raw HTTP request to a validated body: size and time limits, decompression, JSON, schema.
Also: work that ends when its client leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import zlib
from typing import TYPE_CHECKING, Any, TypeVar

import zstandard
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from packhorse.serve.api.validation import UnknownFields, validated
from packhorse.serve.errors import (
    Cancelled,
    DeadlineExceeded,
    Invalid,
    TooLarge,
    UnsupportedCoding,
)
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.settings.http import HttpSettings

if TYPE_CHECKING:
    from packhorse.serve.rest.connections import ConnectionLost

Body = TypeVar("Body", bound=BaseModel)

CODINGS = ("gzip", "deflate", "zstd")
MAX_CODINGS = 2  # one applied after the other
# Input of zstd at a time, which may become 4 MiB: a block has at least 3 bytes, and holds at most
# 128 KiB of content.
PIECE_BYTES = 128


class BodyLimits:
    """Limits on a body's bytes, on the time that it may take to arrive, and on the memory of all
    bodies together.

    One timer watches all bodies that are being read. Nearly every body has arrived already, and a
    timer for each would cost more than the reading.
    """

    def __init__(self, settings: HttpSettings, bodies: Bodies) -> None:
        self.max_bytes = settings.max_body_bytes
        self.timeout_s = settings.stalled_client_timeout_s
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
        """Count the bytes that decompression has added to a body. Raises Overloaded."""
        if size > 0:
            self._bodies.take(request.state.caller, size)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give up bodies that have not arrived in time."""
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
    """The request's JSON as an object of `schema`, see `validated`. Raises as read_object."""
    return validated(await read_object(request, limits), schema, unknown)


async def read_object(request: Request, limits: BodyLimits) -> dict[str, Any]:
    """The request's JSON object. Raises TooLarge before reading all of it, Overloaded when memory
    is short, DeadlineExceeded when it does not arrive, Cancelled, UnsupportedCoding, or Invalid.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.max_bytes:
        raise TooLarge(
            f"The body has {declared} bytes, above the limit of {limits.max_bytes}; send less."
        )
    raw = await limits.read(request)
    if coding := request.headers.get("content-encoding"):
        sent_bytes = len(raw)
        raw = decompressed(raw, coding, limits.max_bytes)
        limits.grew(request, len(raw) - sent_bytes)
    try:
        # Strict, where json.loads would accept surrogates; some clients send a byte order mark.
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


def decompressed(raw: bytes, encoding: str, max_bytes: int) -> bytes:
    """The decompressed body (RFC 9110, section 8.4); `encoding` is the value of Content-Encoding.
    The output is bounded while it is written, so a small body cannot become a huge one. Raises
    UnsupportedCoding, Invalid when the body is not in that coding, TooLarge above max_bytes.
    """
    names = [name.strip().lower().removeprefix("x-") for name in encoding.split(",")]
    names = [name for name in names if name and name != "identity"]
    unknown = [name for name in names if name not in CODINGS]
    if unknown or len(names) > MAX_CODINGS:
        raise UnsupportedCoding(
            f"Content-Encoding {encoding[:80]!r} is not understood here; send "
            f"{', '.join(CODINGS)}, or the body as it is."
        )
    for name in reversed(names):
        try:
            raw = _zstd(raw, max_bytes) if name == "zstd" else _zlib(raw, name, max_bytes)
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            raise Invalid(f"The body is not valid {name}, as its Content-Encoding says.") from error
    return raw


def _zlib(raw: bytes, name: str, max_bytes: int) -> bytes:
    if name == "gzip":
        window = 31
    else:  # "deflate" comes with a zlib header, or without
        window = 15 if raw[:1] and raw[0] & 0x0F == 8 and raw[0] >> 4 <= 7 else -15
    found = bytearray()
    while True:
        decoder = zlib.decompressobj(window)
        found += decoder.decompress(raw, max_bytes + 1 - len(found))
        _check_size(len(found), max_bytes)
        if not decoder.eof:
            raise EOFError
        raw = decoder.unused_data
        if not raw or (name == "gzip" and not raw.strip(b"\0")):  # gzip may be padded
            return bytes(found)
        if name != "gzip":  # only gzip has several members
            raise EOFError


def _zstd(raw: bytes, max_bytes: int) -> bytes:
    # A frame chooses how much memory its decoder needs; RFC 8878 asks decoders to support 8 MiB.
    library = zstandard.ZstdDecompressor(max_window_size=8 * 2**20)
    decoder, found, is_over = library.decompressobj(), bytearray(), False
    for start in range(0, len(raw), PIECE_BYTES):
        piece = raw[start : start + PIECE_BYTES]
        while piece:
            if is_over:  # another frame
                decoder = library.decompressobj()
            found += decoder.decompress(piece)
            _check_size(len(found), max_bytes)
            is_over = decoder.eof
            piece = decoder.unused_data if is_over else b""
    if not is_over:
        raise EOFError
    return bytes(found)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TooLarge(f"The body is above the limit of {max_bytes} bytes, decoded; send less.")


class ClientWatch:
    """Around work for a client: cancels the task inside when the client leaves, since nothing else
    notices that before the first byte is sent. Needs the body to have been read.

    Our own connections tell when they are lost, which costs no task. Other ASGI servers are asked
    with `receive`, in a task.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._lost: ConnectionLost | None = scope.get("state", {}).get("connection_lost")
        self._receive = receive
        self._asking: asyncio.Task[None] | None = None
        self._reason: Exception | None = None

    async def __aenter__(self) -> ClientWatch:
        task = self._task = asyncio.current_task()
        assert task is not None
        self._cancelling = task.cancelling()
        if self._lost is None:
            self._asking = asyncio.create_task(self._ask())
        else:
            self._lost.tell(self._left)
        return self

    async def _ask(self) -> None:
        with contextlib.suppress(Exception):  # what a host's receive raises is an end, too
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self._left()

    def _left(self) -> None:
        self.interrupt(Cancelled("The client closed the connection."))

    def interrupt(self, reason: Exception) -> None:
        """End the work; `reason` is raised at the end of the block."""
        if self._reason is None:
            self._reason = reason
            assert self._task is not None
            self._task.cancel()

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._lost is not None:
            self._lost.tell(None)
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
        if self._reason is not None:
            assert self._task is not None
            if self._task.uncancel() <= self._cancelling:
                raise self._reason from None
