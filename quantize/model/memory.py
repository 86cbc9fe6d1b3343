"""Memory of this process: how much is free, its peak, returning freed memory to the system, and the
error for too little.
"""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from packhorse.quantize.errors import OutOfMemory

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
RETURNED_BYTES = 4 * 1024**2
"""malloc returns freed blocks of at least this size to the system. The system clears pages before
it gives them out again, which at 4 MiB costs 6% of the time, and more below."""


@dataclass(frozen=True)
class _Version:
    """Where a version of Linux control groups has its limits: names of files, and of lines in
    memory.stat. Memory that the kernel reclaims first counts as free, as in MemAvailable.
    """

    base: str
    limits: tuple[str, ...]
    used: str
    reclaimable: tuple[str, ...]


VERSION_1 = _Version(
    "sys/fs/cgroup/memory",
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
VERSION_2 = _Version(
    "sys/fs/cgroup",
    ("memory.max", "memory.high"),
    "memory.current",
    ("active_file", "inactive_file", "slab_reclaimable"),
)


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """The memory that this process may still take: the least of what the machine has free and what
    the limits of its control groups leave, such as a container's. None when the system tells
    neither.
    """
    of_machine = _numbers(root / "proc/meminfo").get("MemAvailable:")
    free = [] if of_machine is None else [1024 * of_machine]
    return min([*free, *_left_in_groups(root)], default=None)


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left in each control group with a limit, from the innermost outwards."""
    for number, controllers, path in re.findall(
        r"^(\d+):(.*?):(.*)$", _text(root / "proc/self/cgroup"), re.MULTILINE
    ):
        if number == "0":
            version = VERSION_2
        elif "memory" in controllers.split(","):
            version = VERSION_1
        else:
            continue
        base = root / version.base
        group = base / path.lstrip("/")
        if not group.is_dir():  # in a container: the path is the host's, only the base is visible
            group = base
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            # "max" means no limit, and so does version 1's number of nearly 2^63, by its size.
            limits = [_text(folder / name).strip() for name in version.limits]
            limit = min((int(text) for text in limits if text.isdecimal()), default=None)
            used = _text(folder / version.used).strip()
            if limit is not None and used.isdecimal():
                stat = _numbers(folder / "memory.stat")
                reclaimable = sum(stat.get(name, 0) for name in version.reclaimable)
                yield max(0, limit - int(used) + reclaimable)


def _numbers(path: Path) -> dict[str, int]:
    """The numbers of a file's lines that begin with a name and a number."""
    found = re.findall(r"^(\S+)\s+(\d+)\b", _text(path), re.MULTILINE)
    return {name: int(number) for name, number in found}


def _text(path: Path) -> str:
    """The file's text; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def return_freed_memory() -> None:
    """Make the C library return freed blocks of RETURNED_BYTES and more to the system at once. By
    default it keeps them for later, which adds up to half a gigabyte for activations and weights of
    all sizes. Does nothing when the library is not glibc.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, RETURNED_BYTES)


def peak_memory_bytes() -> int:
    """The most resident memory that this process has had so far, without child processes."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere


@contextmanager
def memory_errors(planned_bytes: int) -> Iterator[None]:
    """Raises OutOfMemory for the errors of torch and Python that mean that memory is full."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error).lower()
        named = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not named and "allocate memory" not in words and "not enough memory" not in words:
            raise
        raise OutOfMemory(
            f"The memory is full; the plan was for {planned_bytes / 1e9:.1f} GB. Take "
            "fewer --calibration-tokens, a lower --offload-limit, or another --device."
        ) from error
