"""Which model answers: a digest over all that is loaded and how, so that results of another model,
quantization or setting are never taken for this one's.

Weights are read whole, once: a file's digest is remembered by its path, size, times and inode.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

logger = logging.getLogger("packhorse.cache")

# What decides no answer: hidden files, notes and reports.
IGNORED_ENDS = (".md", ".html", ".lock")
MAX_REMEMBERED = 4096
# A file so young may change again without its times telling.
YOUNG_S = 2.0


def identity_of(
    folder: Path | None,
    settings: str,
    environment: Mapping[str, str],
    digests: Digests,
) -> bytes:
    """32 bytes. `settings` are the engine's, in a canonical form; `environment` is what changes the
    engine's answers beside them. Reads every file of the folder that `digests` does not know.
    Raises OSError.
    """
    made = hashlib.sha256()
    for part in (settings, json.dumps(sorted(environment.items()))):
        made.update(hashlib.sha256(part.encode()).digest())
    if folder is not None:
        for path in _files(folder):
            name = str(path.relative_to(folder))
            made.update(hashlib.sha256(name.encode()).digest() + digests.of(path))
        digests.save()
    return made.digest()


def _files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and not path.name.lower().endswith(IGNORED_ENDS):
            yield path


class Digests:
    """sha256 of files, remembered over restarts."""

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
        """A place that cannot be written to costs time at the next start, no more."""
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
