"""Files of a folder that anybody may have made: opened without following links, looked at before
they are used. Called by `formats`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from serve.adapters.headers import shown
from serve.errors import Invalid

_MAX_ENTRIES = 10_000


def check_entries(folder: Path) -> None:
    """Everything below `folder` is a folder, a regular file, or a link that stays inside.

    `folder` itself may be reached through links: who may name which folder is the caller's matter.
    Raises Invalid.
    """
    if not folder.is_dir():
        raise Invalid(f"{folder} is not a folder; give the folder that save_pretrained() wrote.")
    inside = Path(os.path.realpath(folder))
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
                if not Path(os.path.realpath(entry.path)).is_relative_to(inside):
                    raise Invalid(f"{name} is a link out of {folder}; {_COPY}.")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise Invalid(f"{name} in {folder} is not a regular file; remove it.")
    except OSError as error:
        raise Invalid(
            f"{folder} cannot be read: {error.strerror}; let the server's user read it."
        ) from error


_COPY = "copy the folder with its links resolved (`cp -rL`) and give the copy"


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path))


@contextmanager
def open_file(folder: Path, name: str) -> Iterator[BinaryIO]:
    """A regular file of `folder`, for reading. Raises FileNotFoundError; Invalid when it is a link,
    no regular file, or not readable.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for its other end.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(folder / name, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Invalid(f"{name} is a link, and links are not followed; {_COPY}.") from error
        raise Invalid(
            f"{name} cannot be read: {error.strerror}; let the server's user read it."
        ) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Invalid(f"{name} in {folder} is not a regular file; save the adapter again.")
    with open(handle, "rb") as file:  # noqa: PTH123 (a Path cannot be made of a handle)
        yield file
