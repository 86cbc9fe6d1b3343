"""The adapter store on disk: `<store>/<name>/<digest>/` is an immutable version, `.registry.json`
the list of registered adapters, `.verified.json` the record of verified copies. It survives
restarts, and belongs to one server at a time.

formats.py says what a source folder must look like; the registry counts who uses a version.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from packhorse.serve.adapters import weights
from packhorse.serve.adapters.copies import (
    VerifiedCopies,
    VerifiedCopy,
    changed,
    check_copy,
    facts_of,
)
from packhorse.serve.adapters.folders import Source, open_file
from packhorse.serve.adapters.formats import AdapterLimits, CheckedAdapter, check, digest_of, write
from packhorse.serve.errors import Invalid, ServeError, StartupError, Unavailable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
EXAMPLES = "examples.jsonl"
MAX_EXAMPLES_BYTES = 16 * 2**20
INDEX = ".registry.json"  # no adapter's name
_READERS = 4  # of copies at a start


class Registration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of .registry.json: the version that is served under a name."""

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


class AdapterStore:
    """Its methods block: call them in a worker thread, one call at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises StartupError when the folder cannot be used, or another server uses it."""
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
        for left in self._folder.glob(".staging-*"):  # left over by a server that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._verified = VerifiedCopies(self._folder)
        self._saved = b""  # the content of .registry.json

    def close(self) -> None:
        """Release the folder for another server."""
        self._lock.close()

    def stage(self, name: str, source: Source, limits: AdapterLimits, *, mark: str = "") -> Staged:
        """Check the adapter in `source` and copy it in the form that the engine loads; a copy that
        is there already is reused. `mark` is kept with it, see `mark_of`. Raises Invalid, or
        Unavailable when the disk is full.
        """
        check_name(name)
        checked = check(source, limits)
        building = self._folder / f".staging-{uuid.uuid4().hex}"
        try:
            examples = _read_examples(source)
            digest = self._same(name, checked)
            if digest is None:
                building.mkdir()
                digest = write(checked, building).digest
                if examples is not None:
                    (building / EXAMPLES).write_bytes(examples)
                self._publish(building, self.folder_of(name, digest))
            else:  # only what routes to it may be new
                _replace(self.folder_of(name, digest) / EXAMPLES, examples, building)
            folder = self.folder_of(name, digest)
            self._verified.set(name, digest, VerifiedCopy(facts_of(folder), limits.key, mark))
        except OSError as error:
            raise self._not_written(error) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return Staged(digest, checked.rank, folder)

    def _same(self, name: str, checked: CheckedAdapter) -> str | None:
        """The digest of the copy that is there and equal, if one is; nothing is written."""
        size = checked.served_bytes
        there = {
            path.parent.name
            for path in (self._folder / name).glob(f"*/{weights.NAME}")
            if path.stat().st_size == size
        }
        digest = digest_of(checked) if there else ""
        if digest not in there:
            return None
        try:
            check_copy(self.folder_of(name, digest), digest)
        except ServeError:
            return None
        return digest

    def _publish(self, building: Path, folder: Path) -> None:
        """Move the new copy to its place in one rename; it replaces a damaged one."""
        if folder.is_dir():
            damaged = self._folder / f".staging-{uuid.uuid4().hex}"
            folder.replace(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        building.replace(folder)
        _sync(folder.parent)

    def mark_of(self, name: str, digest: str) -> str:
        """The mark that the copy was staged with last; empty when it is not known."""
        known = self._verified.get(name, digest)
        return known.mark if known else ""

    def check_registrations(
        self, registered: Sequence[Registration], limits: AdapterLimits
    ) -> list[Staged | ServeError]:
        """For each registration its copy, or why it cannot be served. Copies that have not changed
        since they were checked against the same limits are not read. Writes nothing.
        """

        def one(entry: Registration) -> Staged | ServeError:
            try:
                return self._check_registration(entry, limits)
            except ServeError as error:
                return error

        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(one, registered))

    def _check_registration(self, entry: Registration, limits: AdapterLimits) -> Staged:
        folder = self.folder_of(entry.name, entry.digest)
        known = self._verified.get(entry.name, entry.digest)
        try:
            facts = facts_of(folder)
        except OSError as error:
            raise changed(folder) from error
        is_whole = known is not None and known.facts == facts
        if known is None or not is_whole or known.limits != limits.key:
            if not is_whole:
                check_copy(folder, entry.digest)
            # The model or the limits may have changed since it was added.
            check(folder, limits)
            mark = known.mark if known else ""
            self._verified.set(entry.name, entry.digest, VerifiedCopy(facts, limits.key, mark))
        return Staged(entry.digest, entry.rank, folder)

    def folder_of(self, name: str, digest: str) -> Path:
        return self._folder / name / digest

    def forget(self, name: str, digest: str) -> None:
        """Delete a version that has no leases any more."""
        folder = self.folder_of(name, digest)
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()

    def save(self, registered: list[Registration]) -> None:
        """Write the whole list of what to serve after a restart. Raises Unavailable."""
        data = msgspec.json.format(msgspec.json.encode(registered))
        new = self._folder / f"{INDEX}.new"
        try:
            if data != self._saved:
                with new.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(self._folder / INDEX)
                _sync(self._folder)
                self._saved = data
        except OSError as error:
            raise self._not_written(error) from error
        self.save_verified(registered)

    def save_verified(self, registered: Sequence[Registration]) -> None:
        """Write the record of their verified copies, for the next start."""
        self._verified.save({f"{entry.name}/{entry.digest}" for entry in registered})

    def _not_written(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"The adapter store {self._folder} cannot be written: {error.strerror}. Make room or "
            "mend it, and send the change again.",
            retry_after_s=60,
        )

    def load(self) -> list[Registration]:
        """The registered adapters. Deletes versions that are not among them. Raises StartupError
        when the list cannot be read.
        """
        path = self._folder / INDEX
        try:
            self._saved = path.read_bytes()
            found = msgspec.json.decode(self._saved, type=list[Registration])
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


def _read_examples(source: Source) -> bytes | None:
    """The adapter's example prompts for routing, if it has any. Raises Invalid."""
    try:
        with open_file(source, EXAMPLES) as file:
            examples = file.read(MAX_EXAMPLES_BYTES + 1)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    if len(examples) > MAX_EXAMPLES_BYTES:
        raise Invalid(
            f"{EXAMPLES} has {size} bytes, above the limit of {MAX_EXAMPLES_BYTES}; a few hundred "
            "examples are enough."
        )
    return examples


def _replace(path: Path, content: bytes | None, building: Path) -> None:
    """Write the content to the file, or delete the file for None. An equal file is left alone."""
    if content is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != content:
        building.mkdir()
        new = building / path.name
        new.write_bytes(content)
        new.replace(path)


def _sync(folder: Path) -> None:
    """fsync the folder, so that a rename in it survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
