"""A folder of adapters: each folder in it is one, under its own name. Looked at again and again, as
notices of changes do not reach network disks and Kubernetes' mounts.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from serve.adapters.base import Adapters
from serve.errors import NotFound, Overloaded, ServeError, Unavailable

logger = logging.getLogger("packhorse.adapters")

LOOK_EVERY_S = 1.0
FILES = ("adapter_config.json", "adapter_model.safetensors", "examples.jsonl")
CONFIG = FILES[0]

# Name -> (modification time in ns, size) of its files: what tells that one is another now.
Signature = tuple[tuple[str, int, int], ...]


class Watch:
    """Keeps a registry like the folder. What others have registered is left alone."""

    def __init__(self, folder: Path, adapters: Adapters) -> None:
        self._folder = folder
        self._adapters = adapters
        self._before: dict[str, Signature] = {}
        self._taken: dict[str, Signature] = {}  # as they were handed over, or refused

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self.look()
            except Exception:  # the next look may do better
                logger.exception("The folder %s could not be looked at", self._folder)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self, *, wait: bool = True) -> None:
        """Hand over what is new and has been the same for two looks (or at once, without `wait`):
        a copy that still goes on is not touched.
        """
        now = await asyncio.to_thread(_signatures, self._folder)
        if now is None:  # the folder is away for a moment; nobody wants all of them removed then
            return
        for name, signature in sorted(now.items()):
            settled = not wait or self._before.get(name) == signature
            if settled and self._taken.get(name) != signature:
                await self._put(name, signature)
        for name in self._taken.keys() - now.keys():
            if not wait or name not in self._before:
                del self._taken[name]
                await self._remove(name)
        self._before = now

    async def _put(self, name: str, signature: Signature) -> None:
        try:
            await self._adapters.put(name, self._folder / name, replace=True)
        except (Overloaded, Unavailable) as error:  # again at the next look
            logger.warning("adapter=%s waits: %s", name, error.message)
            return
        except ServeError as error:  # not before it changes
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


def _signatures(folder: Path) -> dict[str, Signature] | None:
    """None when the folder cannot be read."""
    found: dict[str, Signature] = {}
    try:
        inner = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return None
    for entry in inner:
        parts = []
        for name in FILES:
            try:
                facts = (entry / name).stat()
            except OSError:
                continue
            parts.append((name, facts.st_mtime_ns, facts.st_size))
        if parts and parts[0][0] == CONFIG:
            found[entry.name] = tuple(parts)
    return found
