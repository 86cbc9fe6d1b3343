"""Is the load client right? It meets a server whose delays and faults are known.

    python bench/check_client.py        # seconds; says what differs and ends with 1, or `ok`

The server answers on purpose in the ways that trip byte counting: events cut in two, two events in
one write, the end in a write of its own, `data: ` and `"error"` inside the text. Its faults must
each fail the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from load import Load, LoadError, Target, run_cell

FIRST_S, GAP_S = 0.100, 0.020
LOAD = Load(16, 8, stream=True, seed="check", prompt_tokens=4, output_tokens=10, timeout_s=20)
FAULTS = {
    "refused": "429",
    "error-event": "error inside a stream",
    "too-short": "finish_reason length",
    "cut-off": "closed a connection",
    "no-done": "DONE",
    "hangs": "not answered in time",
}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(reason: str | None = None) -> bytes:
    text = 'data: "error" \ndata: "length"'
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


async def stream(how: str, tokens: int, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    await asyncio.sleep(FIRST_S)
    data = b""
    for number in range(tokens):
        if how == "pairs" and number % 2:
            continue
        if number:
            writer.write(data)
            await asyncio.sleep(GAP_S)
        if how == "cut-off" and number == 3:
            return
        if how == "hangs" and number == 3:
            await asyncio.sleep(LOAD.timeout_s)
        reason = "stop" if how == "too-short" else "length"
        data = chunk(event(reason if number + 1 == tokens else None))
        if how == "error-event" and number == 3:
            data = chunk(b'data: {"error": {"message": "known fault"}}\n\n')
        if how == "pairs":
            data += chunk(event(reason if number + 2 == tokens else None))
        if how == "cut-events":
            # An event has arrived when its last byte has.
            for part in (data[:9], data[9:-3]):
                writer.write(part)
                await asyncio.sleep(0.004)
            data = data[-3:]
    done = b"" if how == "no-done" else chunk(b"data: [DONE]\n\n")
    if how == "late-end":
        writer.write(data + done)
        await asyncio.sleep(0.01)
        writer.write(b"0\r\n")
        await asyncio.sleep(0.01)
        writer.write(b"\r\n")
    else:
        writer.write(data + done + b"0\r\n\r\n")


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    ends = (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError)
    with contextlib.suppress(*ends):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body: dict[str, Any] = json.loads(await reader.readexactly(length))
            how, tokens = body["model"], body["max_tokens"]
            if how == "refused":
                writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: 8\r\n\r\n")
                await asyncio.sleep(0.01)
                writer.write(b"too many")
            elif body["stream"]:
                await stream(how, tokens, writer)
                if how == "cut-off":
                    writer.close()
                    return
            else:
                await asyncio.sleep(FIRST_S)
                count = tokens - 1 if how == "too-short" else tokens
                raw = json.dumps({"usage": {"completion_tokens": count}}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(raw))
                writer.write(raw)


@contextlib.contextmanager
def fake_server() -> Iterator[str]:
    """The server in a thread; yields its URL."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    def stop() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.call_later(0.1, loop.stop)

    loop.call_soon_threadsafe(stop)
    thread.join()


def main() -> None:
    wrong: list[str] = []

    def near(name: str, value: float, low: float, high: float) -> None:
        print(f"{name:45} {value:9.3f}  ({low:g} to {high:g})")
        if not low <= value <= high:
            wrong.append(name)

    def nothing() -> None:
        return None

    reading: Callable[[], None] = nothing
    with fake_server() as url:
        # A thread's timers and a busy machine add a little, never take away.
        for how in ("plain", "cut-events", "late-end", "pairs"):
            cell, _ = run_cell(Target(url, how), LOAD, reading)
            first_ms = FIRST_S * 1e3 + (8 if how == "cut-events" else 0)
            near(f"{how}: TTFT p50, ms", cell["first_token_ms"]["p50"], first_ms - 1, first_ms + 8)
            near(f"{how}: events per token", cell["events_per_token"], 1, 1)
            gaps_ms = cell["inter_token_ms"]
            # In pairs, four gaps of nine are between pairs, the others are 0.
            low, high = {"pairs": (0, 0), "cut-events": (27, 33)}.get(how, (19, 25))
            near(f"{how}: gap p50, ms", gaps_ms["p50"], low, high)
            near(f"{how}: gap p99, ms", gaps_ms["p99"], 19, 45)
            if how == "plain":
                # Two waves of a first token and nine gaps each.
                wall_s = 2 * (FIRST_S + 9 * GAP_S)
                near("plain: requests/s", cell["requests_per_s"], 0.9 * 16 / wall_s, 16 / wall_s)
                near("plain: tokens/s", cell["tokens_per_s"], 0.9 * 160 / wall_s, 160 / wall_s)
        whole, _ = run_cell(Target(url, "plain"), replace(LOAD, stream=False), reading)
        near("whole: latency p50, ms", whole["latency_ms"]["p50"], 99, 110)
        near("whole: requests/s", whole["requests_per_s"], 0.9 * 16 / 0.2, 16 / 0.2)
        for how, words in FAULTS.items():
            some = replace(LOAD, timeout_s=2)
            try:
                run_cell(Target(url, how), some, reading)
            except LoadError as error:
                said = str(error)
            else:
                said = "nothing"
            print(f"{how}: {said[-150:]}")
            if words not in said:
                wrong.append(f"{how} should fail with {words!r}")
        try:
            run_cell(Target(url, "too-short"), replace(LOAD, stream=False), reading)
            wrong.append("a whole answer that is too short should fail")
        except LoadError:
            pass
    print("wrong: " + "; ".join(wrong) if wrong else "ok")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
