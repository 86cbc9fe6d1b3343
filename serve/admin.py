"""What an operator may do to a server that runs, for HTTP and gRPC alike; each change is logged
with the name of the key that made it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from serve.adapters.base import AdapterCard, Adapters
from serve.errors import Invalid, NotFound
from serve.messages import Caller
from serve.routing.base import Routing

logger = logging.getLogger("packhorse.admin")


class Admin:
    """Every call raises NotFound on a server without what it is about."""

    def __init__(self, adapters: Adapters | None = None, routing: Routing | None = None) -> None:
        self._registry = adapters
        self._router = routing

    @property
    def _routing(self) -> Routing:
        if self._router is None:
            raise NotFound(
                "This server does not route by text; that needs adapters and routing.enabled."
            )
        return self._router

    def routes(self) -> list[dict[str, Any]]:
        """The routing in use first, then what came before it."""
        return self._routing.generations()

    async def reload_routes(self, caller: Caller) -> dict[str, Any]:
        """Raises Invalid for files that are wrong."""
        logger.info("key=%s reloads the routes", caller.name)
        return await self._routing.reload()

    def roll_back_routes(self, caller: Caller) -> dict[str, Any]:
        """Raises Conflict when there is nothing before."""
        logger.info("key=%s rolls back the routes", caller.name)
        return self._routing.roll_back()

    @property
    def _adapters(self) -> Adapters:
        if self._registry is None:
            raise NotFound(
                "This server serves no adapters; start it with --adapters, or with adapters.store "
                "in its configuration."
            )
        return self._registry

    def adapters(self) -> list[AdapterCard]:
        return self._adapters.cards()

    def adapter(self, name: str) -> AdapterCard:
        """Raises NotFound."""
        return self._adapters.card(name)

    async def put_adapter(
        self, caller: Caller, name: str, path: str, *, replace: bool, pinned: bool | None
    ) -> AdapterCard:
        """`path` is a folder on the server. Raises what Adapters.put does."""
        adapters = self._adapters
        if not Path(path).is_absolute():
            raise Invalid(
                f"path={path[:200]!r} is not absolute; give the folder's whole path on the server.",
                param="path",
            )
        logger.info("key=%s adds adapter=%s replace=%s", caller.name, name, replace)
        return await adapters.put(name, Path(path), replace=replace, pinned=pinned)

    async def remove_adapter(self, caller: Caller, name: str) -> None:
        """Raises NotFound."""
        logger.info("key=%s removes adapter=%s", caller.name, name)
        await self._adapters.remove(name)

    async def pin_adapter(self, caller: Caller, name: str, *, pinned: bool) -> AdapterCard:
        """Raises NotFound, Invalid."""
        logger.info("key=%s pins adapter=%s pinned=%s", caller.name, name, pinned)
        return await self._adapters.pin(name, pinned=pinned)
