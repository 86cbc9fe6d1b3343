"""/admin: adapters and routes, changed while the server runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from packhorse.serve.api.admin import Admin
from packhorse.serve.api.admin_bodies import AdapterBody, PinBody
from packhorse.serve.errors import Invalid
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.rest.openapi import answers, body_document
from packhorse.serve.rest.requests import BodyLimits, read_body
from packhorse.serve.settings.sections import HttpSettings

SCOPES = ("model", "adapter", "tenant")
CACHE_QUERY: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "query", "schema": {"type": kind}}
        for name, kind in (*((scope, "string") for scope in SCOPES), ("dry_run", "boolean"))
    ]
}


def routes(admin: Admin, settings: HttpSettings, bodies: Bodies) -> APIRouter:
    """Operators' endpoints; keys need the scope `admin`."""
    router = APIRouter(prefix="/admin")
    limits = BodyLimits(settings.max_body_bytes, settings.stalled_client_timeout_s, bodies)

    @router.get("/adapters", responses=answers("Adapters"))
    async def list_adapters() -> dict[str, Any]:
        """Every adapter, and the old versions that requests still use."""
        return {"object": "list", "data": [asdict(card) for card in admin.adapters()]}

    @router.get("/adapters/{name}", responses=answers("Adapter"))
    async def show_adapter(name: str) -> dict[str, Any]:
        return asdict(admin.adapter(name))

    @router.post(
        "/adapters", responses=answers("Adapter"), openapi_extra=body_document(AdapterBody)
    )
    async def put_adapter(request: Request) -> dict[str, Any]:
        """Answers when the engine has it."""
        body = await read_body(request, AdapterBody, limits)
        card = await admin.put_adapter(
            request.state.caller, body.name, body.path, replace=body.replace, pinned=body.pinned
        )
        return asdict(card)

    @router.patch(
        "/adapters/{name}", responses=answers("Adapter"), openapi_extra=body_document(PinBody)
    )
    async def pin_adapter(request: Request, name: str) -> dict[str, Any]:
        body = await read_body(request, PinBody, limits)
        return asdict(await admin.pin_adapter(request.state.caller, name, pinned=body.pinned))

    @router.delete("/adapters/{name}", responses=answers("Removed"))
    async def remove_adapter(request: Request, name: str) -> dict[str, Any]:
        """Requests that use it end on it."""
        await admin.remove_adapter(request.state.caller, name)
        return {"name": name, "removed": True}

    @router.get("/routes", responses=answers("Routings"))
    async def show_routes() -> dict[str, Any]:
        """The routing in use first, then what came before it, each with its self-test."""
        return {"object": "list", "data": admin.routes()}

    @router.post("/routes/reload", responses=answers("Reloaded"))
    async def reload_routes(request: Request) -> dict[str, Any]:
        """Build from the files as they are now, test, and use it unless it does worse."""
        return await admin.reload_routes(request.state.caller)

    @router.post("/routes/rollback", responses=answers("Routing"))
    async def roll_back_routes(request: Request) -> dict[str, Any]:
        return admin.roll_back_routes(request.state.caller)

    @router.get("/cache", responses=answers("Cache"))
    async def show_cache(request: Request) -> dict[str, Any]:
        """What the result cache has, of everything or of one model, adapter or tenant."""
        scope = cache_scope(request)
        return {"flushed": False, **asdict(await admin.cache_amount(scope))}

    @router.delete("/cache", responses=answers("Cache"), openapi_extra=CACHE_QUERY)
    async def flush_cache(request: Request) -> dict[str, Any]:
        """Make it void, on every replica; with `dry_run=true` only say how much would go."""
        scope = cache_scope(request, "dry_run")
        dry_run = request.query_params.get("dry_run", "false")
        if dry_run not in ("true", "false"):
            raise Invalid("dry_run must be true or false.", param="dry_run")
        if dry_run == "true":
            return {"flushed": False, **asdict(await admin.cache_amount(scope))}
        gone = await admin.flush_cache(request.state.caller, scope)
        return {"flushed": True, **asdict(gone)}

    def cache_scope(request: Request, *more: str) -> str:
        """The scope that the query names. Unknown names are refused: a flush of everything must not
        come from a slip of the pen.
        """
        query = request.query_params
        if unknown := sorted(set(query) - {*SCOPES, *more}):
            raise Invalid(
                f"There is no parameter {unknown[0][:80]!r} here; there are "
                f"{', '.join((*SCOPES, *more))}.",
                param=unknown[0][:80],
            )
        return admin.cache_scope(**{name: query.get(name) for name in SCOPES})

    return router
