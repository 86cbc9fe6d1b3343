"""Operators' endpoints: /admin, which changes adapters, routes and the result cache of a running
server, and the same calls under vLLM's names.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from packhorse.serve.api.admin import (
    AdapterBody,
    Admin,
    LoadAdapterBody,
    PinBody,
    UnloadAdapterBody,
)
from packhorse.serve.errors import Conflict, Invalid, NotFound
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.rest.openapi import body_document, documented
from packhorse.serve.rest.requests import BodyLimits, read_body
from packhorse.serve.settings.http import HttpSettings

SCOPES = ("model", "adapter", "tenant")
CACHE_QUERY: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "query", "schema": {"type": kind}}
        for name, kind in (*((scope, "string") for scope in SCOPES), ("dry_run", "boolean"))
    ]
}


def routes(admin: Admin, settings: HttpSettings, bodies: Bodies) -> APIRouter:
    """/admin; keys need the scope `admin`."""
    router = APIRouter(prefix="/admin")
    limits = BodyLimits(settings, bodies)

    @router.get("/adapters", responses=documented("Adapters"))
    async def list_adapters() -> dict[str, Any]:
        """Every adapter, and the old versions that requests still use."""
        return {"object": "list", "data": [asdict(card) for card in admin.adapters()]}

    @router.get("/adapters/{name}", responses=documented("Adapter"))
    async def show_adapter(name: str) -> dict[str, Any]:
        return asdict(admin.adapter(name))

    @router.post(
        "/adapters", responses=documented("Adapter"), openapi_extra=body_document(AdapterBody)
    )
    async def put_adapter(request: Request) -> dict[str, Any]:
        """Answers when the engine has loaded the adapter."""
        body = await read_body(request, AdapterBody, limits)
        card = await admin.put_adapter(
            request.state.caller, body.name, body.path, replace=body.replace, pinned=body.pinned
        )
        return asdict(card)

    @router.patch(
        "/adapters/{name}", responses=documented("Adapter"), openapi_extra=body_document(PinBody)
    )
    async def pin_adapter(request: Request, name: str) -> dict[str, Any]:
        body = await read_body(request, PinBody, limits)
        return asdict(await admin.pin_adapter(request.state.caller, name, pinned=body.pinned))

    @router.delete("/adapters/{name}", responses=documented("Removed"))
    async def remove_adapter(request: Request, name: str) -> dict[str, Any]:
        """Requests that use the adapter still end on it."""
        await admin.remove_adapter(request.state.caller, name)
        return {"name": name, "removed": True}

    @router.get("/routes", responses=documented("Routings"))
    async def show_routes() -> dict[str, Any]:
        """The routing in use first, then the ones before it, each with its self-test."""
        return {"object": "list", "data": admin.routes()}

    @router.post("/routes/reload", responses=documented("Reloaded"))
    async def reload_routes(request: Request) -> dict[str, Any]:
        """Build the routing from its present files, test it, and use it unless it is worse."""
        return await admin.reload_routes(request.state.caller)

    @router.post("/routes/rollback", responses=documented("Routing"))
    async def roll_back_routes(request: Request) -> dict[str, Any]:
        return admin.roll_back_routes(request.state.caller)

    @router.get("/cache", responses=documented("Cache"))
    async def show_cache(request: Request) -> dict[str, Any]:
        """How much the result cache holds of everything, or of one model, adapter or tenant."""
        scope = cache_scope(request)
        return {"flushed": False, **asdict(await admin.cache_amount(scope))}

    @router.delete("/cache", responses=documented("Cache"), openapi_extra=CACHE_QUERY)
    async def flush_cache(request: Request) -> dict[str, Any]:
        """Invalidate it on every replica; with `dry_run=true` only say how much that would be."""
        scope = cache_scope(request, "dry_run")
        dry_run = request.query_params.get("dry_run", "false")
        if dry_run not in ("true", "false"):
            raise Invalid("dry_run must be true or false.", param="dry_run")
        if dry_run == "true":
            return {"flushed": False, **asdict(await admin.cache_amount(scope))}
        flushed = await admin.flush_cache(request.state.caller, scope)
        return {"flushed": True, **asdict(flushed)}

    def cache_scope(request: Request, *more: str) -> str:
        """The scope that the query names. Unknown parameters are refused: a typing error must not
        flush everything.
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


def vllm_routes(admin: Admin, settings: HttpSettings, bodies: Bodies) -> APIRouter:
    """Operators' calls under vLLM's names, see docs/gateways.md; keys need the scope `admin`."""
    router = APIRouter(include_in_schema=False)
    limits = BodyLimits(settings, bodies)

    @router.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """The settings in use, without secrets."""
        return admin.server_info()

    @router.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request) -> PlainTextResponse:
        body = await read_body(request, LoadAdapterBody, limits)
        name, caller = body.lora_name, request.state.caller
        try:
            await admin.put_adapter(
                caller, name, body.lora_path, replace=body.load_inplace, pinned=None
            )
        except Conflict as error:
            raise Invalid(
                f"The lora adapter {name[:80]!r} has already been loaded; to put another in its "
                "place, set load_inplace to true.",
                param="lora_name",
            ) from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request) -> PlainTextResponse:
        body = await read_body(request, UnloadAdapterBody, limits)
        name = body.lora_name
        try:
            await admin.remove_adapter(request.state.caller, name)
        except NotFound as error:
            raise NotFound(
                f"The lora adapter {name[:80]!r} cannot be found.", param="lora_name"
            ) from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router
