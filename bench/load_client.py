"""A load client that costs little CPU, in a process of its own: one cell of load per run.

On a machine with few cores a usual client takes the time that it means to measure: it shares a core
with the server and parses every event. This one reads raw bytes: an event is an occurrence of
`data: ` at the start of a line, stamped with the time at which its bytes arrived. Nothing is parsed
as JSON. Requests run in a closed loop, each of N keep-alive connections sending its next request
when the last one has ended; or they arrive at a rate of their own (`Load.rate_per_s`), each on a
connection that is free.

What it cannot see: what is in the text. That every answer has as many tokens as were asked for
rests on its `"finish_reason": "length"` (streams) or its `completion_tokens` (whole answers), which
are looked at in every answer; servers that end an answer in another way fail here. Any answer that
is not 200 (or, of those that arrive at a rate, 429 with Retry-After), any `"error"` in a stream and
any broken connection end the run with the server's words.

Ten times a second it also does a small fixed piece of work and takes its CPU time: how fast the
machine was during the load. On virtual machines that changes by half from one second to the next.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from load import Load, LoadError, Target, bodies, path_of

COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
LAST_CHUNK = b"0\r\n\r\n"
# What a stream has that was cut at as many tokens as were asked for, and its last event. Plain vLLM
# may call a cut response completed: its tokens are counted once, by whoever runs the cells.
ENDINGS = {
    "responses": (re.compile(rb"\ndata: .*response\.(?:incomplete|completed)"),) * 2,
    "messages": (re.compile(rb'"max_tokens"'), re.compile(rb"\ndata: .*message_stop")),
}
OTHER_ENDING = (re.compile(rb'"length"'), re.compile(rb"\ndata: \[DONE\]"))
ERROR = re.compile(rb'"error"(?!: ?null)')
# Some tenths of a millisecond of what servers do too: objects made, read, turned into text.
PROBE_DOCUMENT = {f"name {number}": [number, str(number), None] for number in range(150)}
PROBE_EVERY_S = 0.1


class Connection(asyncio.Protocol):
    """One keep-alive connection, with at most one request on its way."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stream = run.load.stream
        self._cut, self._last = ENDINGS.get(run.load.kind, OTHER_ENDING)
        self._busy = False
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def send(self, request: bytes) -> None:
        self._busy, self._in_head, self._ending = True, True, False
        self._rest = b""
        self._events: list[float] = []
        self._done = False
        self._sent_s = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if not self._busy:
            self._run.fail(f"bytes that belong to no request: {data[:2000]!r}")
        elif self._in_head:
            self._read_head(self._rest + data, now_s)
        elif self._stream:
            self._read_events(data, now_s)
        else:
            self._read_whole(data, now_s)

    def connection_lost(self, error: Exception | None) -> None:
        if self._busy or (self._run.waiting and not self._run.may_refuse):
            seen = getattr(self, "_rest", b"")[:2000]
            self._run.fail(f"the server closed a connection ({error}); last bytes: {seen!r}")
        self._run.gone(self)

    def _read_head(self, data: bytes, now_s: float) -> None:
        head, blank, rest = data.partition(b"\r\n\r\n")
        if not blank:
            self._rest = data
            return
        fields = head.lower().split(b"\r\n")
        chunked = b"transfer-encoding: chunked" in fields
        lengths = [int(f[15:]) for f in fields if f.startswith(b"content-length:")]
        if head[9:12] != b"200":
            complete = rest.endswith(LAST_CHUNK) if chunked else len(rest) >= (lengths or [0])[0]
            if complete and head[9:12] == b"429" and self._run.may_refuse:
                self._run.refused(now_s - self._sent_s, b"\r\nretry-after:" in head.lower())
                self._next()
                return
            if complete:
                self._run.fail(f"{head[:12]!r}: {rest[:4000]!r}")
            self._rest = data  # the body is on its way
            return
        if self._stream and not chunked:
            self._run.fail(f"a stream that is not chunked: {data[:2000]!r}")
        elif not self._stream and not lengths:
            self._run.fail(f"an answer without content-length: {data[:2000]!r}")
        else:
            self._in_head, self._rest = False, b""
            if self._stream:
                # The break before the body belongs to it: an event is told by the line's start.
                self._read_events(b"\r\n" + rest, now_s)
            else:
                self._length = lengths[0]
                self._read_whole(rest, now_s)

    def _read_events(self, data: bytes, now_s: float) -> None:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        ended = data.endswith(b"\n" + LAST_CHUNK) or data == LAST_CHUNK
        if not ended and not data.endswith(b"\n\r\n"):
            # The bytes end inside an event: count it when the rest of it is here.
            cut = data.rfind(b"\n\r\n") + 3
            if cut < 3:
                self._rest = data
                return
            data, self._rest = data[:cut], data[cut:]
        count = data.count(b"\ndata: ")
        if b'"error"' in data and ERROR.search(data):
            # Within the text the quotes would be escaped, so this is a name or a finish reason.
            self._run.fail(f"an error inside a stream: {data[:4000]!r}")
            return
        if not self._ending and self._cut.search(data):
            self._ending = True
        if self._last.search(data):
            self._done = True
            count -= 1
        if count == 1:
            self._events.append(now_s)
        elif count:
            self._events += [now_s] * count
        if ended:
            if not (self._done and self._ending and self._events):
                self._run.fail(
                    "a stream without [DONE] (or its API's last event) or without finish_reason "
                    f"length (fewer tokens than asked for?); it ended with {data[-2000:]!r}"
                )
                return
            self._run.streamed(self._sent_s, self._events)
            self._next()

    def _read_whole(self, data: bytes, now_s: float) -> None:
        self._rest += data
        if len(self._rest) < self._length:
            return
        found = COMPLETION_TOKENS.search(self._rest)
        if found is None or int(found[1]) != self._run.load.output_tokens:
            self._run.fail(f"not as many tokens as asked for: {self._rest[:4000]!r}")
            return
        self._run.latencies_s.append(now_s - self._sent_s)
        self._next()

    def _next(self) -> None:
        self._busy = False
        self._run.ended(self)


class Run:
    """All connections of one cell, and what they saw."""

    def __init__(self, load: Load, requests: list[bytes]) -> None:
        self.load = load
        self.waiting = requests
        self.first_token_s: list[float] = []
        self.gaps_s: list[float] = []
        self.latencies_s: list[float] = []
        self.events = 0
        self.may_refuse = load.rate_per_s is not None
        self.refusals_s: list[float] = []
        self.not_sent = 0
        self._idle: deque[Connection] = deque()
        self._probes_s: list[float] = []
        self._left = len(requests)
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, message: str) -> None:
        if not self._finished.done():
            self._finished.set_exception(LoadError(message))

    def streamed(self, sent_s: float, events: list[float]) -> None:
        self.events += len(events)
        self.first_token_s.append(events[0] - sent_s)
        self.latencies_s.append(events[-1] - sent_s)
        self.gaps_s += [after - before for before, after in pairwise(events)]

    def refused(self, after_s: float, says_when: bool) -> None:
        if not says_when:
            self.fail("429 without Retry-After")
        self.refusals_s.append(after_s)

    def gone(self, connection: Connection) -> None:
        """The server has ended it. An idle one may be ended at any time."""
        if connection in self._idle:
            self._idle.remove(connection)

    def ended(self, connection: Connection) -> None:
        if self.may_refuse:
            self._idle.append(connection)
        elif self.waiting:
            connection.send(self.waiting.pop())
        self._one_less()

    def _one_less(self) -> None:
        self._left -= 1
        if not self._left and not self._finished.done():
            self._finished.set_result(None)

    async def _arrive(self, rate_per_s: float) -> None:
        """Send everything, at random moments."""
        chooser = random.Random(self.load.seed)
        due_s = time.perf_counter()
        while self.waiting:
            due_s += chooser.expovariate(rate_per_s)
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            request = self.waiting.pop()
            if self._idle:
                # The one that has rested longest: servers end connections that nobody uses.
                self._idle.popleft().send(request)
            else:
                self.not_sent += 1
                self._one_less()

    def _told(self, arriving: asyncio.Task[None]) -> None:
        """A client that has stopped sending would wait for ever."""
        if not arriving.cancelled() and (error := arriving.exception()):
            self.fail(f"sending ended with {error!r}")

    async def _probe(self) -> None:
        while True:
            self._probes_s.append(fixed_work_s())
            await asyncio.sleep(PROBE_EVERY_S)

    async def drive(self, connections: list[Connection]) -> dict[str, Any]:
        probing = asyncio.create_task(self._probe())
        cpu_s, started_s = time.process_time(), time.perf_counter()
        arriving = None
        if self.load.rate_per_s is not None:
            self._idle = deque(connections)
            arriving = asyncio.create_task(self._arrive(self.load.rate_per_s))
            arriving.add_done_callback(self._told)
        else:
            for connection in connections:
                connection.send(self.waiting.pop())
        try:
            async with asyncio.timeout(self.load.timeout_s):
                await self._finished
        except TimeoutError:
            raise LoadError(f"{self._left} requests were not answered in time") from None
        finally:
            if arriving is not None:
                arriving.cancel()
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
        probing.cancel()
        cpu_s -= sum(self._probes_s)
        result: dict[str, Any] = {
            "wall_s": wall_s,
            "requests_per_s": self.load.requests / wall_s,
            "tokens_per_s": self.load.tokens / wall_s,
            "latency_ms": percentiles_ms(self.latencies_s),
            "client_cpu_us_per_token": cpu_s / self.load.tokens * 1e6,
            "probe_us": statistics.fmean(self._probes_s) * 1e6,
        }
        if self.may_refuse:
            result |= {
                "answered": len(self.latencies_s),
                "refused": len(self.refusals_s),
                "refusal_ms": percentiles_ms(self.refusals_s),
                "not_sent": self.not_sent,
            }
        if self.load.stream:
            result |= {
                "first_token_ms": percentiles_ms(self.first_token_s),
                "inter_token_ms": percentiles_ms(self.gaps_s),
                "events_per_token": self.events / self.load.tokens,
            }
        return result


def fixed_work_s() -> float:
    """CPU seconds of the fixed piece of work, now."""
    started_s = time.thread_time()
    json.loads(json.dumps(PROBE_DOCUMENT))
    return time.thread_time() - started_s


def percentiles_ms(values_s: list[float]) -> dict[str, float] | None:
    """p50, p95 and p99 in milliseconds, interpolated; None without values."""
    ordered = sorted(values_s)
    if not ordered:
        return None
    found = {}
    for percent in (50, 95, 99):
        place = (len(ordered) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        value_s = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
        found[f"p{percent}"] = value_s * 1e3
    return found


async def _work(job: dict[str, Any]) -> dict[str, Any]:
    load, target = Load(**job["load"]), Target(**job["target"])
    address = urlsplit(target.url)
    requests = []
    for body in bodies(load, target.model):
        raw = json.dumps(body).encode()
        head = (
            f"POST {path_of(load.kind)} HTTP/1.1\r\nhost: {address.netloc}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        requests.append(head.encode() + raw)
    loop = asyncio.get_running_loop()
    run = Run(load, requests)
    connections = []
    for _ in range(min(load.concurrency, load.requests)):
        _, connection = await loop.create_connection(
            lambda: Connection(run), address.hostname or "127.0.0.1", address.port or 80
        )
        connections.append(connection)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would be seen as the server's pause
    print('{"ready": true}', flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    return await run.drive(connections)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def main() -> None:
    """The client process. Errors go out as JSON too, so that the caller can tell them."""
    job = json.loads(sys.stdin.readline())
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            result = runner.run(_work(job))
        except (LoadError, OSError) as error:
            result = {"error": str(error)}
        print(json.dumps(result), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
