"""What an operator may do to a running server, whichever protocol carries the call. Each change is
logged with the name of the key that made it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packhorse.serve.adapters.base import AdapterCard, Adapters
from packhorse.serve.api.validation import LenientBody, StrictBody
from packhorse.serve.cache.base import Amount, Results
from packhorse.serve.cache.key import EVERYTHING, adapter_scope, model_scope
from packhorse.serve.errors import Invalid, NotFound
from packhorse.serve.messages import Caller
from packhorse.serve.routing.base import Routing

logger = logging.getLogger("packhorse.admin")


class AdapterBody(StrictBody):
    """POST /admin/adapters. `path` is a folder on the server, as PEFT saves it."""

    name: str
    path: str
    replace: bool = False
    """Whether the adapter may replace one of the same name."""
    pinned: bool | None = None


class PinBody(StrictBody):
    """PATCH /admin/adapters/NAME."""

    pinned: bool


class LoadAdapterBody(LenientBody):
    """POST /v1/load_lora_adapter, as in vLLM."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(LenientBody):
    """POST /v1/unload_lora_adapter, as in vLLM."""

    lora_name: str


class Admin:
    """The operators' calls. Those about adapters, routes or the result cache raise NotFound on a
    server that has none.
    """

    def __init__(
        self,
        adapters: Adapters | None = None,
        routing: Routing | None = None,
        cache: Results | None = None,
        *,
        model: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`model` is the name of the base model, `settings` the settings without secrets."""
        self._registry = adapters
        self._router = routing
        self._cache = cache
        self._model = model
        self._settings = dict(settings or {})

    def server_info(self) -> dict[str, Any]:
        return {"model": self._model, "settings": self._settings}

    @property
    def _routing(self) -> Routing:
        if self._router is None:
            raise NotFound(
                "This server does not route by text; that needs adapters and routing.enabled."
            )
        return self._router

    def routes(self) -> list[dict[str, Any]]:
        """The routing in use first, then the ones before it."""
        return self._routing.versions()

    async def reload_routes(self, caller: Caller) -> dict[str, Any]:
        """Build the routing from its files as they are now. Raises Invalid for wrong files."""
        logger.info("key=%s reloads the routes", caller.name)
        return await self._routing.reload()

    def roll_back_routes(self, caller: Caller) -> dict[str, Any]:
        """Return to the routing before. Raises Conflict when there is none."""
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

    @property
    def _results(self) -> Results:
        if self._cache is None:
            raise NotFound("This server has no result cache: cache.enabled is off.")
        return self._cache

    def cache_scope(
        self, *, model: str | None = None, adapter: str | None = None, tenant: str | None = None
    ) -> str:
        """The entries that a flush is about; without any name, all. Raises Invalid, NotFound."""
        if sum(name is not None for name in (model, adapter, tenant)) > 1:
            raise Invalid("Give one of model, adapter and tenant, or none for everything.")
        if model is not None and model != self._model:
            raise NotFound(f"There is no model {model[:80]!r} here; it is {self._model!r}.")
        if model is not None:
            return model_scope(model)
        if adapter is not None:
            self.adapter(adapter)
            return adapter_scope(adapter)
        return EVERYTHING if tenant is None else self._results.tenant_scope(tenant)

    async def cache_amount(self, scope: str) -> Amount:
        """How much the result cache holds of this scope."""
        return await self._results.amount(scope)

    async def flush_cache(self, caller: Caller, scope: str) -> Amount:
        """Invalidate this scope on every replica; returns what it held. Raises Unavailable."""
        logger.info("key=%s flushes the result cache: %s", caller.name, scope)
        return await self._results.flush(scope)
