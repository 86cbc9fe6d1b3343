"""A cache of trained tables on disk, so that a restart need not train again.

The key of a table is a digest of everything that its training depends on. Each file has a digest of
its content, so a damaged file is not used. The router calls it as its `Train`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import uuid
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import msgspec

from packhorse.serve.routing import cross_validation, learned, text
from packhorse.serve.routing import train as training
from packhorse.serve.routing.train import Job, Train, Trained
from packhorse.serve.routing.train_process import train as train_in_child

logger = logging.getLogger("packhorse.routing")

MAGIC = b"packhorse routes 1\n"
MAX_TABLES = 4
_NEW = ".new-"


class TableCache:
    """Returns the table from `folder`, or trains and stores it there; keeps the newest MAX_TABLES.
    A folder belongs to one server.
    """

    def __init__(self, folder: Path, train: Train = train_in_child) -> None:
        self._folder = folder
        self._train = train

    async def __call__(self, job: Job) -> Trained:
        """Raises what training raises. A failing disk costs only the time of another training."""
        key = await asyncio.to_thread(_key_of, job)
        path = self._folder / f"{key.hex()}.table"
        found = await asyncio.to_thread(_read, path, key)
        if found is None:
            found = await self._train(job)
            await asyncio.to_thread(self._write, path, key, found)
        return found

    def _write(self, path: Path, key: bytes, trained: Trained) -> None:
        data = msgspec.msgpack.encode(trained)
        new = self._folder / f"{_NEW}{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as file:
                file.writelines((MAGIC, key, hashlib.sha256(data).digest(), data))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
            tables = sorted(self._folder.glob("*.table"), key=lambda each: each.stat().st_mtime)
            left = self._folder.glob(_NEW + "*")  # left over by a server that was killed
            for old in (*tables[:-MAX_TABLES], *left):
                old.unlink()
        except OSError as error:
            logger.warning("The routes' table cannot be kept in %s: %s", path, error)
            with suppress(OSError):
                new.unlink(missing_ok=True)


def _key_of(job: Job) -> bytes:
    # Sorted, because the order in which adapters were added does not matter.
    work = msgspec.msgpack.Encoder(order="sorted").encode(job)
    return hashlib.sha256(_made_with() + work).digest()


def _made_with() -> bytes:
    """A digest of the code that trains: versions of libraries, and the source of our modules. A
    version number raised by hand would be forgotten once.
    """
    digest = hashlib.sha256()
    for name in ("scikit-learn", "numpy", "scipy"):
        digest.update(f"{name} {version(name)}\0".encode())
    for module in (training, cross_validation, learned, text):
        assert module.__file__ is not None
        digest.update(hashlib.sha256(Path(module.__file__).read_bytes()).digest())
    return digest.digest()


def _read(path: Path, key: bytes) -> Trained | None:
    """The table in the file; None when there is no file, or a damaged one."""
    try:
        content = path.read_bytes()
        data = content[len(MAGIC) + 64 :]
        if content[: len(MAGIC) + 64] != MAGIC + key + hashlib.sha256(data).digest():
            raise ValueError("its digest is another")
        trained = msgspec.msgpack.decode(data, type=Trained)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # msgspec's are ValueErrors
        logger.warning("The routes' table %s is not used, but trained again: %s", path, error)
        return None
    logger.info("The routes' table is there already: %s", path)
    return trained
