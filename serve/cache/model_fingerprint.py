"""The model's fingerprint: a digest over the model's files, the engine's settings and the
environment. It is part of every cache key, so results of another model, quantization or setting
never match.

Without a shared store the fingerprint need not be the same on other replicas: it is made of the
files' paths, sizes, times and inodes, and no weights are read. With a store the files are hashed,
each once: its digest is remembered by path, size, times and inode. Hashing runs in a thread beside
the engine's loading and may take longer; until it ends, the fingerprint is the one without a store,
so that no other replica finds the results.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

logger = logging.getLogger("packhorse.cache")

# Files that do not change answers, besides hidden ones: notes and reports.
IGNORED_ENDS = (".md", ".html", ".lock")
MAX_REMEMBERED = 4096
# A file younger than this may change again without a change of its times.
YOUNG_S = 2.0


def fingerprint_of(
    folders: Sequence[Path],
    settings: str,
    environment: Mapping[str, str],
    digests: FileDigests,
) -> bytes:
    """The fingerprint, 32 bytes. `settings` are the engine's in a canonical form, `environment` are
    the variables and versions that change its answers. Hashes the files of the folders that are not
    in `digests`. Raises OSError.
    """
    made = hashlib.sha256()
    for part in (settings, json.dumps(sorted(environment.items()))):
        made.update(hashlib.sha256(part.encode()).digest())
    for folder in folders:
        made.update(hashlib.sha256(b"folder").digest())
        for path in _files(folder):
            name = str(path.relative_to(folder))
            made.update(hashlib.sha256(name.encode()).digest() + digests.of(path))
    digests.save()
    return made.digest()


def states_of(folders: Sequence[Path]) -> list[list[object]]:
    """Path, size, times and inode of every file; reads no content. Raises OSError."""
    return [[str(path), *_state(path)] for folder in folders for path in _files(folder)]


def _files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and not path.name.lower().endswith(IGNORED_ENDS):
            yield path


class Fingerprints:
    """Makes the fingerprints of the engines of one model, one after the other."""

    def __init__(self, digests: FileDigests | None, tell: Callable[[bytes], None]) -> None:
        """`digests` None: results are not shared with other replicas. `tell` is called with the
        fingerprint of the current engine, possibly twice, and from other threads.
        """
        self._digests = digests
        self._tell = tell
        self._secret = secrets.token_bytes(32)
        self._reading = threading.Lock()
        self._telling = threading.Lock()
        self._last: Loading | None = None

    def begin(
        self, folders: Sequence[Path], settings: str, environment: Mapping[str, str]
    ) -> Loading:
        """Call it before an engine is built from these. Raises OSError."""
        states = states_of(folders)
        mine = json.dumps([settings, sorted(environment.items()), states]).encode()
        own = hashlib.blake2b(mine, key=self._secret, digest_size=32).digest()
        shared: Future[bytes] | None = None
        digests = self._digests
        if digests is not None:
            shared = Future()

            def read(shared: Future[bytes] = shared, digests: FileDigests = digests) -> None:
                try:
                    with self._reading:  # the next engine's thread waits, and finds the digests
                        shared.set_result(fingerprint_of(folders, settings, environment, digests))
                except OSError as error:
                    shared.set_exception(error)

            threading.Thread(target=read, name="fingerprint", daemon=True).start()
        return Loading(self, folders, states, own, shared)

    def told(self, loading: Loading, fingerprint: bytes) -> None:
        """Pass the fingerprint on, if the loading is that of the last engine."""
        with self._telling:
            if self._last is loading:
                self._tell(fingerprint)

    def is_last(self, loading: Loading) -> None:
        with self._telling:
            self._last = loading


class Loading:
    """One engine's loading. Call `ended` when the engine is built."""

    def __init__(
        self,
        fingerprints: Fingerprints,
        folders: Sequence[Path],
        states: list[list[object]],
        own: bytes,
        shared: Future[bytes] | None,
    ) -> None:
        self._fingerprints = fingerprints
        self._folders, self._states = folders, states
        self._own, self._shared = own, shared
        self._has_changed = False
        self._started_s = time.monotonic()

    def ended(self) -> None:
        """Pass on the fingerprint: the shared one if it is ready, else the local one first."""
        self._fingerprints.is_last(self)
        shared = self._shared
        if shared is None or not shared.done():
            self._tell(self._own)
        if shared is not None:
            shared.add_done_callback(self._is_read)  # runs at once if it is done

    def _is_read(self, shared: Future[bytes]) -> None:
        try:
            fingerprint = shared.result()
        except OSError as error:
            logger.error("The model's files cannot be read, so no result is shared: %s", error)
            self._tell(self._own)
            return
        self._tell(fingerprint)
        if not self._has_changed:
            took_s = time.monotonic() - self._started_s
            logger.info("The model's files are known after %.0f s; results are shared", took_s)

    def _tell(self, fingerprint: bytes) -> None:
        if self._has_changed:
            return
        try:
            is_same = states_of(self._folders) == self._states
        except OSError:
            is_same = False
        if not is_same:
            logger.warning(
                "The files of %s have changed while they were loaded: what answers is neither the "
                "old model nor the new one for certain, and its results are shared with nobody",
                ", ".join(map(str, self._folders)),
            )
            self._has_changed, fingerprint = True, secrets.token_bytes(32)
        self._fingerprints.told(self, fingerprint)


class FileDigests:
    """The sha256 digests of files, remembered over restarts."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._known: dict[str, list[object]] = {}
        self._has_news = False
        try:
            known = json.loads(file.read_text()) if file and file.is_file() else {}
            self._known = {str(path): list(entry) for path, entry in known.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            logger.warning("%s cannot be read, files are read again: %s", file, error)

    def of(self, path: Path) -> bytes:
        """The file's digest, 32 bytes. Raises OSError."""
        name = str(path.resolve())
        state = _state(path)
        known = self._known.get(name)
        if known is not None and known[:-1] == state:
            return bytes.fromhex(str(known[-1]))
        while True:
            with path.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256")
            if (now := _state(path)) == state:
                break
            state = now  # it is being written
        if time.time() - path.stat().st_mtime > YOUNG_S:
            self._known[name] = [*state, digest.hexdigest()]
            self._has_news = True
        return digest.digest()

    def save(self) -> None:
        """Write the digests. A failure is only logged: it costs time at the next start."""
        if self._file is None or not self._has_news:
            return
        newest = dict(list(self._known.items())[-MAX_REMEMBERED:])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._file.parent, prefix=self._file.name, delete=False
            ) as written:
                json.dump(newest, written)
            Path(written.name).replace(self._file)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._file, error)


def _state(path: Path) -> list[object]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]
