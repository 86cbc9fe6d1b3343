"""How much memory this process may still take, and how what it no longer needs is given back."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
RETURNED_BYTES = 4 * 1024**2
"""Less costs more time, as returned memory is cleared before it comes back: 4 MiB 6%."""


@dataclass(frozen=True)
class _Version:
    """Where control groups of one version say what they limit: names of files, and of lines in
    memory.stat. What a limit squeezes out first counts as free, as in MemAvailable.
    """

    base: str
    limits: tuple[str, ...]
    used: str
    squeezed: tuple[str, ...]


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
    """What this process may still take: of the machine's memory, and of what the control groups
    leave that it is in, such as a container's limit. None where the system tells neither.
    """
    of_machine = _numbers(root / "proc/meminfo").get("MemAvailable:")
    free = [] if of_machine is None else [1024 * of_machine]
    return min([*free, *_left_in_groups(root)], default=None)


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes, of each group with a limit, from the innermost to the outermost that can be seen."""
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
        if not group.is_dir():  # a container may see its own group alone, by the host's name
            group = base
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            # "max" is no limit; nor is version 1's, nearly 2^63, which is above any machine's.
            limits = [_text(folder / name).strip() for name in version.limits]
            limit = min((int(text) for text in limits if text.isdecimal()), default=None)
            used = _text(folder / version.used).strip()
            if limit is not None and used.isdecimal():
                stat = _numbers(folder / "memory.stat")
                squeezed = sum(stat.get(name, 0) for name in version.squeezed)
                yield max(0, limit - int(used) + squeezed)


def _numbers(path: Path) -> dict[str, int]:
    """The file's lines that begin with a name and a number."""
    found = re.findall(r"^(\S+)\s+(\d+)\b", _text(path), re.MULTILINE)
    return {name: int(number) for name, number in found}


def _text(path: Path) -> str:
    """Empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
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
