"""The watched folder: each subfolder is an adapter with the subfolder's name. It is polled, because
change notifications do not work on network disks and Kubernetes mounts.

An adapter is removed when its folder disappears while others stay. A volume that is not mounted
looks like an empty folder, so when all folders disappear, the adapters stay registered. An adapter
kept in this way is removed when its folder was seen again and then disappears, or by an operator.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from packhorse.serve.adapters.base import Adapters
from packhorse.serve.errors import NotFound, Overloaded, ServeError, Unavailable
from packhorse.serve.metrics import ModelMetrics

logger = logging.getLogger("packhorse.adapters")

LOOK_EVERY_S = 1.0
FILES = ("adapter_config.json", "adapter_model.safetensors", "examples.jsonl")
CONFIG = FILES[0]

# Name, modification and change time in ns, size and inode of each file of an adapter; differs when
# a file has changed. New weights of the same size may have the old modification time.
Signature = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Look:
    """One poll. `path` is the watched folder with links resolved, `folder` its device and inode;
    `listed` are the names in it, `adapters` those that are readable adapters.
    """

    path: Path
    folder: tuple[int, int]
    listed: frozenset[str]
    adapters: dict[str, Signature]


class FolderWatch:
    """Keeps the registry in sync with the folder. Leaves adapters alone that others have
    registered.
    """

    def __init__(
        self, folder: Path, adapters: Adapters, *, metrics: ModelMetrics | None = None
    ) -> None:
        self._metrics = metrics or ModelMetrics()
        self._folder = folder
        self._adapters = adapters
        self._before: dict[str, Signature] = {}
        self._taken: dict[str, Signature] = {}  # as registered, or refused
        self._kept: set[str] = set()  # of these, those that stay although their folders are gone
        self._seen: tuple[int, int] | None = None  # device and inode at the last poll; None: away
        self._doubts: dict[str, set[str]] = {}  # adapters that the last poll kept, by reason

    async def run(self) -> None:
        """Poll for ever."""
        while True:
            try:
                await self.look()
            except Exception:  # the next poll may succeed
                logger.exception("The folder %s could not be looked at", self._folder)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self, *, wait: bool = True) -> None:
        """Poll once: register new and changed adapters, remove those that are gone. With `wait`, an
        adapter must be the same in two polls, so that one that is still being copied is left alone.
        """
        now = await asyncio.to_thread(_look, self._folder)
        if now is None:
            self._seen = None
            self._doubt({"away": set(self._taken)})
            return
        self._kept -= now.adapters.keys()
        missing = self._taken.keys() - now.adapters.keys()
        gone, listed = missing - now.listed, missing & now.listed
        reason = None
        if not now.adapters:
            reason = "empty"
        elif self._seen != now.folder:
            reason = "changed"
        doubts = {"unreadable": listed}
        if reason is not None:
            self._kept |= gone
            doubts[reason] = gone
        self._seen = now.folder
        self._doubt(doubts)
        for name, signature in sorted(now.adapters.items()):
            settled = not wait or self._before.get(name) == signature
            if settled and self._taken.get(name) != signature:
                await self._put(name, now.path / name, signature)
        for name in gone - self._kept - self._before.keys():
            del self._taken[name]
            await self._remove(name)
        self._before = now.adapters

    def _doubt(self, doubts: dict[str, set[str]]) -> None:
        """Count the adapters that stay although their folders are missing; log each change once."""
        served = {
            reason: {name for name in names if name in self._adapters}
            for reason, names in doubts.items()
        }
        for reason, names in served.items():
            if not names:
                continue
            self._metrics.adapter_folder_doubts.labels(reason).inc()
            if self._doubts.get(reason) != names:
                first = ", ".join(sorted(names)[:5])
                logger.warning(
                    "The folder %s is %s: %d adapters that are not there stay (%s); DELETE "
                    "/admin/adapters/NAME removes one",
                    self._folder, reason, len(names), first,
                )  # fmt: skip
        self._doubts = served

    async def _put(self, name: str, source: Path, signature: Signature) -> None:
        mark = _mark(source, signature)
        if name not in self._taken and self._adapters.mark(name) == mark:
            self._taken[name] = signature  # the served version was made of it, before a restart
            return
        try:
            await self._adapters.put(name, source, replace=True, mark=mark)
        except (Overloaded, Unavailable) as error:  # the next poll tries again
            logger.warning("adapter=%s waits: %s", name, error.message)
            return
        except ServeError as error:  # tried again once its files have changed
            logger.error("adapter=%s in %s is refused: %s", name, self._folder, error.message)
        except Exception:
            logger.exception("adapter=%s in %s is refused", name, self._folder)
        self._taken[name] = signature

    async def _remove(self, name: str) -> None:
        try:
            await self._adapters.remove(name)
        except NotFound:
            pass
        except ServeError as error:
            logger.error("adapter=%s cannot be removed: %s", name, error.message)


def _mark(folder: Path, signature: Signature) -> str:
    """A digest of the folder's path and signature."""
    return hashlib.sha256(repr((str(folder), signature)).encode()).hexdigest()


def _look(folder: Path) -> _Look | None:
    """The folder now; None when it cannot be read."""
    try:
        path = folder.resolve()
        facts = folder.stat()
        inner = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, in older Pythons
        return None
    found = {}
    for entry in inner:
        signature = _signature(entry)
        if signature is not None:
            found[entry.name] = signature
    listed = frozenset(entry.name for entry in inner)
    return _Look(path, (facts.st_dev, facts.st_ino), listed, found)


def _signature(folder: Path) -> Signature | None:
    """The signature of an adapter's folder; None when it is no adapter or cannot be read."""
    parts = []
    for name in FILES:
        try:
            facts = (folder / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            if name == CONFIG:
                return None
            continue
        except OSError:
            return None
        parts.append((name, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino))
    return tuple(parts)
