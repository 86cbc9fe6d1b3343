"""Starts `packhorse serve` and other commands as forks of one process that has imported vLLM.

Importing vLLM takes 17 seconds of CPU, and a server needs it twice: in itself and in Python's
forkserver, of which its engine is a fork. Here one process pays for it once per test session. What
is forked runs the command's own code from its first line; only the import is missing. The server's
forkserver is a fork too, and where a test ends that, the server starts a real one.

Some tests start real commands all the same (`running_server(..., fresh=True)`), and a command whose
environment changes how libraries are imported is always a real one, see `fits`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any

import setproctitle

ROOT = Path(__file__).resolve().parent.parent
PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
# Read when libraries are imported: with other values a fork is not what the command would be.
READ_AT_IMPORT = ("LD_", "OMP_", "MKL_", "KMP_", "ONEDNN_", "ATEN_", "TORCH", "VLLM_", "PYTHON")
# Read at each use, so a fork heeds them.
READ_LATER = {
    "PYTHONPATH", "PYTHONWARNINGS", "PYTHONUNBUFFERED", "VLLM_CPU_INT4_W4A8",
    "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS",
    "VLLM_WORKER_MULTIPROC_METHOD",
}  # fmt: skip

START_LIMIT_S = 180.0
"""For the import of vLLM, which the first fork waits for."""


class Forked:
    """A forked command: a child of this process, with what tests use of subprocess.Popen."""

    def __init__(self, pid: int, arguments: Sequence[str]) -> None:
        self.pid = pid
        self.args = list(arguments)
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process that has imported vLLM; started with the first command, ended by `close`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._environment: dict[str, str] = {}

    def start(self) -> None:
        """Returns at once; the first command waits for the import. A dead one is replaced."""
        if self._process is not None and self._process.poll() is None:
            return
        from packhorse.serve.engines.vllm.patches import forkserver

        # The allocator and the OpenMP of the engine's process, which will be a fork of a fork.
        self._environment = dict(os.environ)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env={**os.environ, **forkserver.forkserver_environment(), "PYTHONSAFEPATH": ""},
            )
        ours.settimeout(START_LIMIT_S)
        self._socket = ours

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether a fork would be what a command with this environment is."""
        ours = self._environment or os.environ
        names = {name for name in (*ours, *environment) if name.startswith(READ_AT_IMPORT)}
        return all(ours.get(name) == environment.get(name) for name in names - READ_LATER)

    def run(
        self, command: Sequence[str], folder: Path, log: int, environment: Mapping[str, str]
    ) -> Forked:
        """`packhorse ...`, `quantize ...` or `python -m MODULE ...` in `folder`; `log` is the
        descriptor of the file that gets what it prints.
        """
        self.start()
        assert self._socket is not None
        asked = {"command": list(command), "folder": str(folder), "environment": dict(environment)}
        content = json.dumps(asked).encode()
        try:
            with _orphans_are_ours():  # the fork's parent ends at once, and we are its next
                socket.send_fds(self._socket, [len(content).to_bytes(4, "big")], [log])
                self._socket.sendall(content)
                said = self._socket.recv(4)
            if len(said) < 4:
                raise AssertionError("the process that has imported vLLM has ended")
        except BaseException:  # an answer that nobody reads would be taken for the next one's
            self.close(at_once=True)
            raise
        return Forked(int.from_bytes(said, "big"), command)

    def close(self, *, at_once: bool = False) -> None:
        if self._process is not None and self._socket is not None:
            self._socket.close()
            if at_once:
                self._process.kill()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = self._socket = None


@contextlib.contextmanager
def _orphans_are_ours() -> Any:
    """Meanwhile, a process below ours whose parent ends becomes our child."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def main(descriptor: int) -> None:
    """Import, then fork whenever asked to; in a fork, run the command."""
    before = dict(os.environ)
    # It looks for the process's title beside the environment, which forks replace.
    setproctitle.getproctitle()
    from packhorse.serve.settings import prepare_environment

    prepare_environment()
    from packhorse.serve.engines.vllm.patches.forkserver import PRELOADED

    # All that a server has imported when it is ready, and all that its engine's process has.
    for name in (
        *PRELOADED,
        "packhorse.serve.app",
        "packhorse.serve.rpc.server",
        "packhorse.serve.engines.vllm.engine",
    ):
        __import__(name)
    # By what was imported; but for the loader's, which mean something to new programs alone.
    added = {
        name: value
        for name, value in os.environ.items()
        if before.get(name) != value and not name.startswith("LD_")
    }
    gc.freeze()
    with socket.socket(fileno=descriptor) as asked:
        while True:
            head, (*logs,), _, _ = socket.recv_fds(asked, 4, 1)
            if not head:
                os._exit(0)  # without the libraries' last words
            content = b""
            size = int.from_bytes(head, "big")
            while len(content) < size:
                content += asked.recv(size - len(content))
            said = _fork_twice()
            if said is None:
                break
            for log in logs:
                os.close(log)
            asked.sendall(said.to_bytes(4, "big"))
    _become(json.loads(content), logs[0], added)


def _fork_twice() -> int | None:
    """The process number of the grandchild; None in that one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()  # a process group, as a shell gives it
        grandchild = os.fork()
        if grandchild:
            os.write(writing, grandchild.to_bytes(4, "big"))
            os._exit(0)
        os.close(reading)
        os.close(writing)
        return None
    os.close(writing)
    with open(reading, "rb") as said:  # noqa: PTH123  # a pipe
        number = int.from_bytes(said.read(4), "big")
    os.waitpid(child, 0)
    return number


def _become(asked: dict[str, Any], log: int, added: dict[str, str]) -> None:
    """Be the command, in this process."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    os.setpgid(0, 0)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update({**added, **asked["environment"]})
    sys.path[:0] = [part for part in os.environ.get("PYTHONPATH", "").split(":") if part]
    random.seed()
    util.spawnv_passfds = _spawn  # type: ignore[assignment]
    if os.environ.get("VLLM_LOGGING_LEVEL", "ERROR") != "ERROR":
        from vllm.logger import _configure_vllm_root_logger

        _configure_vllm_root_logger()  # as its import does
    name, *arguments = asked["command"]
    if arguments[:1] == ["-m"]:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = [name, *arguments]
    if Path(name).name == "packhorse":
        from packhorse.serve.cli import app
    else:
        from packhorse.quantize.cli import app
    app()


_spawn_real = util.spawnv_passfds


def _spawn(path: bytes, arguments: Sequence[Any], descriptors: Sequence[int]) -> int:
    """multiprocessing's way to start a helper. Its forkserver is a fork of ours, the first time."""
    code = arguments[-1]
    if not (isinstance(code, str) and "multiprocessing.forkserver" in code):
        return _spawn_real(path, arguments, descriptors)
    util.spawnv_passfds = _spawn_real  # type: ignore[assignment]  # should that end: a real one
    pid = os.fork()
    if pid:
        return pid
    try:
        from packhorse.serve.engines.vllm.patches import forkserver

        forkserver._IMPORTED_BY = os.getpid()
        kept = {0, 1, 2, *descriptors}
        for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
            if int(entry) not in kept:
                with contextlib.suppress(OSError):
                    os.close(int(entry))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        exec(code, {})  # as `python -c` would
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:  # noqa: BLE001  # told, as Python tells it at a process' end
        sys.excepthook(*sys.exc_info())
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
