"""How much memory this process may still take, and how what it no longer needs is given back."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 2**60
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
RETURNED_BYTES = 4 * 1024**2
"""Less costs more time, as returned memory is cleared before it comes back: 4 MiB 6%."""


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """What this process may still take: of the machine's memory, and of what the control groups
    leave that it is in, such as a container's limit. None where the system tells neither.
    """
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    of_machine = [int(found[1]) * 1024] if found else []
    return min([*of_machine, *_left_in_groups(root)], default=None)


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes, of each group with a limit, from the innermost to the outermost that can be seen."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", VERSION_1
        else:
            continue
        group = base / path.lstrip("/")
        if not group.is_dir():  # a container may see its own group alone, by the host's name
            group = base
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            limit, used = (_text(folder / name).strip() for name in names[:2])
            # Without a limit it is "max", or nearly 2^63.
            if limit.isdecimal() and int(limit) < UNLIMITED and used.isdecimal():
                stat = _text(folder / "memory.stat")
                cached = re.search(rf"^{names[2]} (\d+)", stat, re.MULTILINE)
                yield max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))


def _text(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def return_freed_memory() -> None:
    """Have the C library give what is larger than RETURNED_BYTES back to the system as soon as it
    is freed. Its own rule is to keep it for later, which for activations and weights of all sizes
    adds up to half a gigabyte. Does nothing where the library is not glibc.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, RETURNED_BYTES)
