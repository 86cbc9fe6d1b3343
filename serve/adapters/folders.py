"""Safe reading from a folder whose content is not trusted: a file is checked after it is opened and
before it is read, so that nothing outside the folder is read, even if the folder changes meanwhile.
Called by `formats` and the store.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from packhorse.serve.adapters.headers import shown
from packhorse.serve.errors import Invalid

_MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class Source:
    """A folder, and the root that all files read from it must lie in (a path without links).

    Links may lead anywhere within `root`: in a hub cache they lead from a snapshot to its blobs.
    """

    folder: Path
    root: Path

    @classmethod
    def alone(cls, folder: Path) -> Source:
        """A folder that is its own root. It may itself be reached through links."""
        return cls(folder, Path(os.path.realpath(folder)))


def check_entries(source: Source) -> None:
    """Check that everything below the folder is a folder, a regular file, or a link within the
    root.

    Raises Invalid. This gives an early message; `open_file` checks again what is read.
    """
    folder = source.folder
    if not folder.is_dir():
        raise Invalid(f"{folder} is not a folder; give the folder that save_pretrained() wrote.")
    try:
        for count, entry in enumerate(_entries(folder)):
            if count >= _MAX_ENTRIES:
                raise Invalid(
                    f"{folder} has more than {_MAX_ENTRIES} files; put the adapter's own files "
                    "into a folder of their own."
                )
            name = shown(str(Path(entry.path).relative_to(folder)))
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                if not Path(os.path.realpath(entry.path)).is_relative_to(source.root):
                    raise _leads_out(name, source)
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise Invalid(f"{name} in {folder} is not a regular file; remove it.")
    except OSError as error:
        raise Invalid(
            f"{folder} cannot be read: {error.strerror}; let the server's user read it."
        ) from error


def _leads_out(name: str, source: Source) -> Invalid:
    return Invalid(
        f"{name} is a link out of {source.root}; copy the folder with its links resolved "
        "(`cp -rL`) and give the copy."
    )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path))


def _find(path: Path) -> int:
    """An O_PATH handle, which can be examined and not read: opening a device or a pipe in this way
    has no side effects.
    """
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


@contextmanager
def open_file(source: Source, name: str) -> Iterator[BinaryIO]:
    """Open a regular file of the folder for reading; a link may lead to one within the root. Raises
    FileNotFoundError; Invalid when it is not a regular file, outside the root, or not readable.
    """
    try:
        found = _find(source.folder / name)
        try:
            handle = _open_found(found, source, name)
        finally:
            os.close(found)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Invalid(
            f"{name} cannot be read: {error.strerror}; let the server's user read it."
        ) from error
    with open(handle, "rb") as file:  # noqa: PTH123 (a Path cannot be made of a handle)
        yield file


def _open_found(found: int, source: Source, name: str) -> int:
    """Open the found file for reading, by its handle: its path may lead elsewhere by now."""
    itself = f"/proc/self/fd/{found}"
    # The kernel's path of the handle. That of a deleted file ends in " (deleted)": harmless here.
    if not Path(os.readlink(itself)).is_relative_to(source.root):  # noqa: PTH115
        raise _leads_out(name, source)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        raise Invalid(f"{name} in {source.folder} is not a regular file; save the adapter again.")
    return os.open(itself, os.O_RDONLY | os.O_CLOEXEC)
