"""What the programs of coding agents share: a home of their own, a proxy that refuses, an end in
time.

An agent is run as `python NAME.py BASE_URL MODEL KEY CALL...`, like the other programs. It sees no
variable of this environment, no file of the user, and no network beyond this machine: whatever it
asks of its proxy is refused and told.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import BASE_URL

MODULES = Path(os.environ.get("CLIENT_MODULES", ".")) / "node_modules"
TIMEOUT_S = 150.0
MARKER = "42-felonia"
COMMAND = "echo $((6 * 7))-felonia"
"""What is in its output is nowhere in what the agent was told."""
REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def scripted(name: str, arguments: Mapping[str, Any]) -> str:
    """A prompt that an echo engine answers with itself: text, then a call, in Hermes' words."""
    asked = json.dumps({"name": name, "arguments": arguments})
    return f"I run it.\n<tool_call>\n{asked}\n</tool_call>"


@dataclass
class Home:
    """An agent's folders, environment, and what it asked of the network."""

    folder: Path
    proxy: str
    outside: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def environment(self, **more: str) -> dict[str, str]:
        xdg = {
            f"XDG_{name}_HOME": str(self.folder / name.lower())
            for name in ("CONFIG", "DATA", "CACHE", "STATE")
        }
        proxies = {"HTTP_PROXY": self.proxy, "HTTPS_PROXY": self.proxy, "ALL_PROXY": self.proxy}
        here = urlsplit(BASE_URL).hostname or ""
        lower = {name.lower(): value for name, value in proxies.items()}
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"), "TERM": "dumb", "DO_NOT_TRACK": "1",
            "NO_PROXY": f"{here},localhost", "no_proxy": f"{here},localhost",
            **xdg, **proxies, **lower, **more,
        }  # fmt: skip


@contextlib.contextmanager
def home() -> Iterator[Home]:
    with (
        tempfile.TemporaryDirectory(prefix="agent-") as made,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        found = Home(Path(made), f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("work", "tmp", "config", "data", "cache", "state"):
            (found.folder / name).mkdir()
        threading.Thread(target=_refuse, args=(listener, found.outside), daemon=True).start()
        yield found


def _refuse(listener: socket.socket, asked: list[str]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the program is over
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            words = connection.recv(4096).split()
            asked.append(words[1].decode(errors="replace") if len(words) > 1 else "?")
            connection.sendall(REFUSAL)


@dataclass(frozen=True)
class Run:
    """How an agent's run ended, and the JSON lines that it wrote."""

    code: int
    events: list[dict[str, Any]]
    errors: str

    def told(self) -> str:
        return f"exit code {self.code}; {json.dumps(self.events[-3:])[-500:]} {self.errors[-300:]}"


def run(command: Sequence[str | Path], where: Home, environment: dict[str, str], text: str) -> Run:
    """Run an agent with `text` on its standard input. Raises AssertionError when it does not end,
    or leaves processes behind.
    """
    process = subprocess.Popen(
        [str(word) for word in command], cwd=where.work, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(text, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise AssertionError(
            f"not done in {TIMEOUT_S:.0f} s: {output[-300:]} {errors[-300:]}"
        ) from error
    if _is_alive(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("the agent has ended and left processes behind")
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return Run(process.returncode, [json.loads(line) for line in lines], errors)


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def ended_well(done: Run) -> Run:
    if done.code != 0:
        raise AssertionError(done.told())
    return done
