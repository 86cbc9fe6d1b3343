"""Servers to measure: started one at a time, their CPU read from /proc, stopped with all children.

Ours and plain vLLM's get the same engine settings, and neither logs requests. What vLLM's API
process and ours share (AsyncLLM, detokenizer, uvicorn, its httptools) is the same installation.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load import Target

MODEL = "bench"
BIN = Path(sys.executable).parent

# For benches of what is around the engine: CPUs without AVX-512 multiply bfloat16 at a tenth of the
# speed.
DTYPE = "bfloat16" if "avx512f" in Path("/proc/cpuinfo").read_text() else "float32"

# vLLM's words, which are ours too.
ENGINE = {
    "max_model_len": 256,
    "max_num_seqs": 64,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 512 * 1024 * 1024,
    "dtype": "bfloat16",
}


def quiet_environment() -> dict[str, str]:
    """The same silence for everyone; a failure still shows."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    return {**os.environ, **quiet}


@dataclass(frozen=True)
class Cpu:
    """Seconds of CPU so far: the API process with its threads, all below it, and the machine."""

    api_s: float
    children_s: float
    machine_s: float
    at_s: float

    def per_token_us(self, later: Cpu, tokens: int) -> dict[str, float]:
        return {
            "api_cpu_us_per_token": (later.api_s - self.api_s) / tokens * 1e6,
            "engine_cpu_us_per_token": (later.children_s - self.children_s) / tokens * 1e6,
        }

    def others(self, later: Cpu, client_s: float) -> float:
        """How many CPUs were busy with something else, on average."""
        ours_s = later.api_s - self.api_s + later.children_s - self.children_s + client_s
        return (later.machine_s - self.machine_s - ours_s) / (later.at_s - self.at_s)


@dataclass(frozen=True)
class Server:
    """A server that answers. `api_pid` None: not ours to look at, so nothing is said of its CPU."""

    target: Target
    api_pid: int | None

    def cpu(self) -> Cpu | None:
        if self.api_pid is None:
            return None
        children = [cpu_s(pid) for pid in descendants(self.api_pid)]
        return Cpu(cpu_s(self.api_pid), sum(children), machine_cpu_s(), time.monotonic())


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold spaces; [0] is the state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, ended threads included, children not.

    It is what /proc/PID/stat has as utime + stime, in nanoseconds instead of steps of 10 ms: the
    process's CPU clock, whose number is made as in Linux's posix-timers_types.h.
    """
    return time.clock_gettime((~pid << 3) | 2)


def machine_cpu_s() -> float:
    """CPU seconds of everything that runs here, time stolen by the host not among it."""
    user, nice, system, _idle, _iowait, irq, softirq = (
        int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """All processes below this one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
    found = [pid]
    for parent in found:  # grows while it is walked
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


@contextmanager
def packhorse(folder: Path, work_folder: Path, *, has_cache: bool = True) -> Iterator[Server]:
    """`packhorse serve FOLDER` with its defaults, the result cache among them."""
    settings = {"engine": {**ENGINE, "dtype": DTYPE}, "cache": {"enabled": has_cache}}
    with packhorse_with(folder, work_folder, settings) as server:
        yield server


@contextmanager
def packhorse_with(folder: Path, work_folder: Path, settings: dict[str, Any]) -> Iterator[Server]:
    """The same with settings of the caller's. Without a result cache unless they have one: plain
    vLLM has none, and what is measured is not to be answered from it.
    """
    config = _written(work_folder / "packhorse.yaml", {"cache": {"enabled": False}, **settings})
    arguments = [str(folder), "--served-model-name", MODEL, "--config", str(config)]
    with _packhorse(arguments, work_folder) as server:
        yield server


@contextmanager
def echo(work_folder: Path, *, delay_s: float = 0.0, cache: bool = False) -> Iterator[Server]:
    """`packhorse serve --engine echo`."""
    engine = {"kind": "echo", "echo_delay_s": delay_s}
    config = _written(work_folder / "echo.yaml", {"engine": engine, "cache": {"enabled": cache}})
    arguments = ["--served-model-name", MODEL, "--config", str(config)]
    with _packhorse(arguments, work_folder) as server:
        yield server


@contextmanager
def _packhorse(arguments: list[str], work_folder: Path) -> Iterator[Server]:
    port = free_port()
    # Above info there is no line per request, as there is none in vLLM's server without access log.
    command = [BIN / "packhorse", "serve", *arguments, "--port", port, "--log-level", "warning"]
    with _running("packhorse", command, port, "/health/ready", work_folder) as server:
        yield server


@contextmanager
def plain_vllm(folder: Path, work_folder: Path, more: Sequence[Any] = ()) -> Iterator[Server]:
    """vLLM's own server, with `more` flags. Its `vllm` command does not work in the CPU wheel, its
    module does.
    """
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", folder, "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", port,
        "--stream-interval", 1, "--disable-uvicorn-access-log", "--no-enable-log-requests",
        "--uvicorn-log-level", "warning",
    ]  # fmt: skip
    for name, value in ENGINE.items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [flag, value]
    command += more
    with _running("vllm", command, port, "/health", work_folder) as server:
        yield server


def _written(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _running(
    name: str, command: list[Any], port: int, health: str, work_folder: Path
) -> Iterator[Server]:
    """Start, wait until healthy, stop. Raises RuntimeError with the log's end if it does not start.

    Children left over would disturb the next server, so it returns only when they are gone.
    """
    log_path = work_folder / f"{name}-{time.monotonic_ns()}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=log,
            stderr=log,
            cwd=work_folder,
            env=quiet_environment(),
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, url + health, log_path)
        yield Server(Target(url, MODEL), process.pid)
    finally:
        _stop(process)


def _wait_until_healthy(
    process: subprocess.Popen[bytes], url: str, log_path: Path, *, timeout_s: float = 300
) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    what = "did not start in time" if process.poll() is None else f"ended: {process.returncode}"
    raise RuntimeError(f"The server {what}; {log_path} ends:\n{log_path.read_text()[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    below = descendants(process.pid) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline_s = time.monotonic() + 30
    while any(map(_lives, below)):
        if time.monotonic() > deadline_s:
            os.killpg(process.pid, signal.SIGKILL)  # the session that was made for it
            deadline_s += 30
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
