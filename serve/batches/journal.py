"""An append-only file of lines that survives a kill: what is in it is whole lines, up to a torn
last one, which is cut off when the file is opened again.

Lines are written in groups, and a group is on disk (fsync) before it counts as written. The file is
published by renaming it, so nothing is copied.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

PIECE_BYTES = 2**20


class Journal:
    """Its methods block, and belong to one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it, and cut off a torn last line. Raises OSError."""
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.size = _whole_lines(self._file)
        os.ftruncate(self._file, self.size)

    def read(self, take: Callable[[bytes], None]) -> None:
        """Give every line to `take`, in order. Raises OSError, and what `take` raises."""
        with self._path.open("rb") as lines:
            for line in lines:
                take(line)

    def write(self, lines: Iterable[bytes]) -> int:
        """Append whole lines; when this returns they are on disk. Returns their bytes. Raises
        OSError; then nothing of them is left in the file.
        """
        group = memoryview(b"".join(lines))
        os.ftruncate(self._file, self.size)  # a write before may have failed, and so its repair
        try:
            written = 0
            while written < len(group):
                written += os.write(self._file, group[written:])
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self.size)
            raise
        self.size += len(group)
        return len(group)

    def close(self) -> None:
        """Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _whole_lines(file: int) -> int:
    """Bytes up to and with the last end of a line."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - PIECE_BYTES)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
