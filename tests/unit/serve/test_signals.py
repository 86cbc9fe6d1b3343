"""What SIGHUP does, by how the server was started; each time in a process of its own."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

SERVER = """
import asyncio, sys
from packhorse.serve.signals import Signals

async def main():
    signals = Signals()
    if sys.argv[1] == "routes":
        signals.take_hangups(lambda: print("reloaded", flush=True))
    else:
        signals.take_hangups(None)
    print("ready", flush=True)
    await signals.stop.wait()
    print("draining", flush=True)

asyncio.run(main())
"""


def ignore_hangups() -> None:
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def take_hangups() -> None:
    """As a shell does, also where these tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def said_after(
    *signals: signal.Signals,
    routes: bool,
    stdin: int | None = subprocess.DEVNULL,
    before: Callable[[], None] | None = None,
) -> list[str]:
    """What it says after these signals. SIGTERM ends it in every case."""
    command = [sys.executable, "-c", SERVER, "routes" if routes else "-"]
    with subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=before or take_hangups,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        said = []
        for number in signals:
            process.send_signal(number)
            if number is signal.SIGHUP and routes and stdin == subprocess.DEVNULL and not before:
                said.append(process.stdout.readline())  # it comes before the next
        said += process.stdout.readlines()
        assert process.wait(30) == 0
    return said


HANGUP, END = signal.SIGHUP, signal.SIGTERM


def test_without_a_terminal_it_reads_the_routes_again() -> None:
    assert said_after(HANGUP, END, routes=True) == ["reloaded\n", "draining\n"]


def test_without_routes_it_ends_nothing() -> None:
    """The default of every process is to end at once, and undrained."""
    assert said_after(HANGUP, HANGUP, END, routes=False) == ["draining\n"]


@pytest.mark.parametrize("routes", [True, False])
def test_a_terminal_that_is_closed_drains_it(routes: bool) -> None:
    ours, theirs = pty.openpty()
    try:
        assert said_after(HANGUP, routes=routes, stdin=theirs) == ["draining\n"]
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("routes", [True, False])
def test_who_was_told_to_ignore_it_does(routes: bool) -> None:
    assert said_after(HANGUP, END, routes=routes, before=ignore_hangups) == ["draining\n"]


def test_a_closed_stdin_is_no_terminal() -> None:
    assert said_after(HANGUP, END, routes=False, before=lambda: os.close(0)) == ["draining\n"]
