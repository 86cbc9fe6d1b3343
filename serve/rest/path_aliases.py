"""What other programs call by vLLM's and SageMaker's names: health, load, adapters, the tokenizer.

The same things under our own names are in `generate`, `tokens` and `admin`; docs/gateways.md says
who calls which.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from packhorse.serve.api.admin import Admin
from packhorse.serve.api.admin_bodies import LoadAdapterBody, UnloadAdapterBody
from packhorse.serve.errors import Conflict, Invalid, NotFound
from packhorse.serve.limits.body_memory import Bodies
from packhorse.serve.rest.requests import BodyLimits, read_body
from packhorse.serve.service import Service
from packhorse.serve.settings.sections import HttpSettings


def routes(service: Service) -> APIRouter:
    """For everybody: what tells the state of the server."""
    router = APIRouter(include_in_schema=False)

    @router.get("/ping")
    @router.post("/ping")
    async def ping() -> Response:
        """SageMaker's name for health: no key is sent with it."""
        await service.check_ready()
        return Response()

    @router.get("/load")
    async def load() -> dict[str, int]:
        """Requests from their arrival to their last token."""
        return {"server_load": service.in_flight}

    @router.get("/is_sleeping")
    async def is_sleeping() -> dict[str, bool]:
        """Engines here do not sleep."""
        return {"is_sleeping": False}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> JSONResponse:
        return JSONResponse(await service.engine.tokenizer_info())

    return router


def operators_routes(admin: Admin, settings: HttpSettings, bodies: Bodies) -> APIRouter:
    """For operators; keys need the scope `admin`."""
    router = APIRouter(include_in_schema=False)
    limits = BodyLimits(settings.max_body_bytes, settings.stalled_client_timeout_s, bodies)

    @router.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """The settings in force, without secrets."""
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
