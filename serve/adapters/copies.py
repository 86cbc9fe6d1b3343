"""Integrity of the copies in the adapter store: a full check of one copy, and a record of verified
copies, so that a restart need not read all of them.

The record only saves time at the start: `check_copy` reads a whole copy before each load into the
engine. Called by the store and by the LoRA cache.
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

# Size, modification and change time in ns, and inode of each file. Nobody can set the last two
# back.
Facts = tuple[tuple[int, int, int, int], ...]


def facts_of(folder: Path) -> Facts:
    """The facts of the copy's files. Raises OSError."""
    found = [(folder / name).stat() for name in (weights.NAME, configs.NAME)]
    return tuple((each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for each in found)


def check_copy(folder: Path, digest: str) -> None:
    """Read the copy's files and compare their digest. As a side effect they are in the page cache
    when the engine reads them. Blocking.

    Raises Invalid when the copy has changed; Unavailable when it cannot be read at the moment.
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


class VerifiedCopy(msgspec.Struct, frozen=True):
    """A copy that was verified: the facts of its files then, the key of the limits that it was
    checked against, and the mark of its source folder, if that is watched.
    """

    facts: Facts
    limits: str
    mark: str = ""


class VerifiedCopies:
    """The record, in a file of its own: when it is lost, copies are read again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / MEMORY
        self._saved = b""
        self._known: dict[str, VerifiedCopy] = {}
        try:
            self._saved = self._path.read_bytes()
            self._known = msgspec.json.decode(self._saved, type=dict[str, VerifiedCopy])
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("%s is not used, and all copies are read again: %s", self._path, error)

    def get(self, name: str, digest: str) -> VerifiedCopy | None:
        return self._known.get(f"{name}/{digest}")

    def set(self, name: str, digest: str, known: VerifiedCopy) -> None:
        self._known[f"{name}/{digest}"] = known

    def save(self, there: Container[str]) -> None:
        """Write the record of the copies in `there` (NAME/DIGEST), and drop the others. A failure
        is logged, not raised: the record only saves time.
        """
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
