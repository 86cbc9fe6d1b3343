"""Adapters on disk: `<store>/<name>/<digest>/` is a version that never changes, `.registry.json`
what was registered. Survives restarts; one server a store.

What a source folder must look like is in formats.py. Who uses what is the registry's business.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec

from serve.adapters.formats import AdapterLimits, check, write
from serve.errors import Invalid, StartupError, Unavailable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
EXAMPLES = "examples.jsonl"
MAX_EXAMPLES_BYTES = 16 * 2**20
INDEX = ".registry.json"  # no adapter's name


class Remembered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of .registry.json: what is served under a name."""

    name: str
    digest: str
    rank: int
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Staged:
    """A version on disk."""

    digest: str
    rank: int
    folder: Path


def check_name(name: str) -> None:
    """Names become folders here and `model` in requests. Raises Invalid."""
    if not NAME.fullmatch(name):
        raise Invalid(
            f"The adapter name {name[:80]!r} is not 1 to 64 letters, digits, dots, dashes or "
            "underscores that begin with a letter or digit; choose another.",
            param="name",
        )


class Store:
    """Blocking: call it in a worker thread. One call at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises StartupError when the folder cannot be had, or another server has it."""
        self._folder = folder.resolve()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StartupError(
                f"{folder} is the adapter store of another server that runs; set adapters.store to "
                "another folder."
            ) from error
        except OSError as error:
            raise StartupError(f"adapters.store {folder} cannot be used: {error}") from error
        for left in self._folder.glob(".staging-*"):  # by a server that was killed
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Another server may have the folder now."""
        self._lock.close()

    def stage(self, name: str, source: Path, limits: AdapterLimits) -> Staged:
        """A copy of what `source` holds, checked, and in the form that the engine loads. Raises
        Invalid, or Unavailable when the disk is full.
        """
        check_name(name)
        checked = check(source, limits)
        building = self._folder / f".staging-{uuid.uuid4().hex}"
        try:
            building.mkdir()
            written = write(checked, building)
            self._copy_examples(source, building)
            folder = self._folder / name / written.digest
            if folder.is_dir():  # the same weights: only what routes to them may be new
                new = building / EXAMPLES
                if new.exists():
                    new.replace(folder / EXAMPLES)
                else:
                    (folder / EXAMPLES).unlink(missing_ok=True)
            else:
                folder.parent.mkdir(exist_ok=True)
                building.replace(folder)
                _sync(folder.parent)
        except OSError as error:
            raise self._not_written(error) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return Staged(written.digest, written.rank, folder)

    def _copy_examples(self, source: Path, target: Path) -> None:
        """The prompts that say what belongs to this adapter, if there are any."""
        examples = source / EXAMPLES
        if examples.is_symlink() or not examples.is_file():
            return
        size = examples.stat().st_size
        if size > MAX_EXAMPLES_BYTES:
            raise Invalid(
                f"{EXAMPLES} has {size} bytes, above the limit of {MAX_EXAMPLES_BYTES}; a few "
                "hundred examples are enough."
            )
        shutil.copyfile(examples, target / EXAMPLES)

    def folder_of(self, name: str, digest: str) -> Path:
        return self._folder / name / digest

    def forget(self, name: str, digest: str) -> None:
        """Delete a version that nobody uses any more."""
        folder = self.folder_of(name, digest)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()

    def remember(self, registered: list[Remembered]) -> None:
        """What to serve after a restart; all of it, each time. Raises Unavailable."""
        new = self._folder / f"{INDEX}.new"
        try:
            with new.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(registered)))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._folder / INDEX)
            _sync(self._folder)
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"The adapter store {self._folder} cannot be written: {error.strerror}. Make room or "
            "mend it, and send the change again.",
            retry_after_s=60,
        )

    def recall(self) -> list[Remembered]:
        """Raises StartupError when it cannot be read. Deletes what it does not mention."""
        path = self._folder / INDEX
        try:
            found = msgspec.json.decode(path.read_bytes(), type=list[Remembered])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            raise StartupError(
                f"{path} cannot be read: {error}. Repair it, or delete it and register the "
                "adapters again."
            ) from error
        known = {(entry.name, entry.digest) for entry in found}
        for folder in self._folder.glob("*/*/"):
            if (folder.parent.name, folder.name) not in known and len(folder.name) == 64:
                self.forget(folder.parent.name, folder.name)
        return found


def _sync(folder: Path) -> None:
    """So that a rename outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
