"""The processes below this one: which there are, whether they get on, and their end."""

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
    """SIGKILL, which also ends stopped processes; those that are gone are passed over."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """The files of Python's shared memory that these processes use."""
    found: set[Path] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {Path(entry.path) for entry in process.memory_maps(grouped=True)}
    return {path for path in found if path.match("/dev/shm/psm_*")}


def print_stacks_when_asked() -> None:
    """Make SIGUSR1 print the stacks of all threads of this process to stderr, while it goes on: for
    a server that seems to hang.
    """
    with contextlib.suppress(RuntimeError, AttributeError, OSError, ValueError):  # without stderr
        faulthandler.register(signal.SIGUSR1, all_threads=True)


_claimed: set[psutil.Process] = set()


def claim(processes: Iterable[psutil.Process]) -> None:
    """These belong to an engine that lives: `end_unclaimed_children` spares them."""
    _claimed.update(processes)


def release(processes: Iterable[psutil.Process]) -> None:
    """Their engine is at its end."""
    _claimed.difference_update(processes)


def end_children() -> None:
    """SIGKILL for all processes below this one."""
    end(children())


def end_unclaimed_children() -> None:
    """SIGKILL for what was started for an engine that is not there yet: not for other engines'
    processes, nor for those that they are children of (a forkserver).
    """
    spared = set(_claimed)
    for process in _claimed:
        with contextlib.suppress(psutil.Error):
            spared.update(process.parents())
    end(child for child in children() if child not in spared)


class Activity:
    """How much CPU some processes use, from one call to the next.

    Their child processes count when they do nothing themselves: torch compiles some kernels when
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
        """CPU seconds of all child processes, and of those that have ended."""
        total = 0.0
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.children_user + times.children_system
                for helper in process.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        total += sum(helper.cpu_times()[:4])
        return total

    def since_last_look(self, *, with_helpers: bool) -> float:
        """CPU seconds used since the last call; 0 while one of the processes is stopped or gone.
        `with_helpers`: by child processes too, since they were last looked at.
        """
        used_s = self._cpu_s()
        spent_s, self._used_s = used_s - self._used_s, used_s
        if any(map(_is_stopped, self._processes)):
            return 0.0
        if (
            with_helpers and spent_s < IDLE_S
        ):  # looking at all processes of the machine takes milliseconds
            before_s, self._helpers_s = self._helpers_s, self._helpers_cpu_s()
            # Less than before: another process has reaped one of them.
            spent_s += max(0.0, self._helpers_s - before_s)
        return spent_s


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() in STOPPED
    except psutil.Error:
        return True
