"""The copies in the store: whether one is still what was written there, and a memory of which were
looked at, so that a restart need not read them all.

The memory saves time and decides nothing: `check_copy` reads all of a copy before it goes into the
engine. Called by the store, and by `residency`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Container
from pathlib import Path

import msgspec
from packhorse.serve.adapters import configs, weights
from packhorse.serve.errors import Invalid, Unavailable

logger = logging.getLogger("packhorse.adapters")

MEMORY = ".verified.json"  # in the store; no adapter's name
_CHUNK_BYTES = 2**22

# Size, modification and change time in ns, and inode of each file. The last two are others even
# where somebody has set the first two back.
Facts = tuple[tuple[int, int, int, int], ...]


def facts_of(folder: Path) -> Facts:
    """Raises OSError."""
    found = [(folder / name).stat() for name in (weights.NAME, configs.NAME)]
    return tuple((each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for each in found)


def check_copy(folder: Path, digest: str) -> None:
    """Read all that the engine would, into the page cache as well: it then waits for no disk.
    Blocking.

    Raises Invalid when it is not what was stored; Unavailable when it cannot be read, now.
    """
    sha256 = hashlib.sha256()
    try:
        for name in (weights.NAME, configs.NAME):
            with (folder / name).open("rb", buffering=0) as file:
                while data := file.read(_CHUNK_BYTES):
                    sha256.update(data)
    except FileNotFoundError as error:
        raise changed(folder) from error
    except OSError as error:
        raise Unavailable(
            f"The stored copy {folder} cannot be read: {error.strerror}; mend the disk, or add the "
            "adapter again.",
            retry_after_s=30,
        ) from error
    if sha256.hexdigest() != digest:
        raise changed(folder)


def changed(folder: Path) -> Invalid:
    return Invalid(f"The stored copy {folder} is not what it was; add the adapter again.")


class Known(msgspec.Struct, frozen=True):
    """What is known of a copy: its facts when it was found whole, the key of the limits that it was
    found to fit, and the mark of the source that it was made of, if that is watched.
    """

    facts: Facts
    limits: str
    mark: str = ""


class Memory:
    """On disk, apart from what is registered: when it is lost, copies are read again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / MEMORY
        self._saved = b""
        self._known: dict[str, Known] = {}
        try:
            self._saved = self._path.read_bytes()
            self._known = msgspec.json.decode(self._saved, type=dict[str, Known])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("%s is not used, and all copies are read again: %s", self._path, error)

    def get(self, name: str, digest: str) -> Known | None:
        return self._known.get(f"{name}/{digest}")

    def set(self, name: str, digest: str, known: Known) -> None:
        self._known[f"{name}/{digest}"] = known

    def save(self, there: Container[str]) -> None:
        """Keep what is `there` (NAME/DIGEST), and forget the rest. Never raises: it is a memory."""
        self._known = {name: known for name, known in self._known.items() if name in there}
        data = msgspec.json.encode(self._known)
        if data == self._saved:
            return
        new = self._path.with_name(f"{MEMORY}.new")
        try:
            new.write_bytes(data)
            new.replace(self._path)
            self._saved = data
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._path, error)
