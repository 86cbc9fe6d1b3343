"""The processes below ours: who they are, whether they get on, and their end."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

IDLE_S = 0.02
TRACKER = "multiprocessing.resource_tracker"  # must outlive the others: it cleans up after them
STOPPED = {psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE}


def children() -> list[psutil.Process]:
    """All below this process, but the resource tracker."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if TRACKER not in " ".join(process.cmdline()):
                found.append(process)
    return found


def end(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL, which also ends stopped ones; those that are gone already are passed over."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """The files of Python's shared memory that processes have in use."""
    found: set[Path] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {Path(entry.path) for entry in process.memory_maps(grouped=True)}
    return {path for path in found if path.match("/dev/shm/psm_*")}


def print_stacks_when_asked() -> None:
    """From now on SIGUSR1 makes this process print the stacks of its threads to stderr, and go on:
    for a server that seems to hang.
    """
    with contextlib.suppress(RuntimeError, AttributeError, OSError, ValueError):  # without stderr
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def end_children() -> None:
    end(children())


class Activity:
    """Whether processes use the CPU, seen from one look to the next.

    What they have started counts when they do nothing themselves: torch compiles some kernels when
    they are first needed, and waits for the compiler.
    """

    def __init__(self, processes: Iterable[psutil.Process]) -> None:
        self._processes = list(processes)
        self._used_s = self._cpu_s()
        self._helpers_s = self._helpers_cpu_s()

    def _cpu_s(self) -> float:
        total = 0.0
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _helpers_cpu_s(self) -> float:
        """Of all that is below, and of all that was and has ended."""
        total = 0.0
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.children_user + times.children_system
                for helper in process.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        total += sum(helper.cpu_times()[:4])
        return total

    def since_last_look(self) -> float:
        """CPU seconds used since the last call; 0 while one of them is stopped or gone."""
        used_s = self._cpu_s()
        spent_s, self._used_s = used_s - self._used_s, used_s
        if any(map(_is_stopped, self._processes)):
            return 0.0
        if spent_s < IDLE_S:  # looking at all processes of the machine takes milliseconds
            before_s, self._helpers_s = self._helpers_s, self._helpers_cpu_s()
            # Less than before: one that was reaped by somebody else.
            spent_s += max(0.0, self._helpers_s - before_s)
        return spent_s


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() in STOPPED
    except psutil.Error:
        return True
