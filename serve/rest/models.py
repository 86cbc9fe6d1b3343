"""What clients ask about models besides answers: /v1/models, /tokenize, /detokenize,
/tokenizer_info.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from packhorse.serve.api import models as model_api
from packhorse.serve.api import tokenize as tokenizer_api
from packhorse.serve.api.generate import CallContext
from packhorse.serve.api.models import ModelCard
from packhorse.serve.api.tokenize import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from packhorse.serve.api.validation import LenientBody, validated
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.rest.anthropic import model_info, models_page
from packhorse.serve.rest.errors import is_anthropic
from packhorse.serve.rest.openapi import body_document, documented
from packhorse.serve.rest.requests import BodyLimits, read_body, read_object
from packhorse.serve.rest.responses import json_response
from packhorse.serve.settings.http import HttpSettings


def routes(pipeline: Pipeline, settings: HttpSettings) -> APIRouter:
    """The endpoints over one pipeline, in vLLM's forms."""
    router = APIRouter()
    limits = BodyLimits(settings, pipeline.admission.bodies)

    @router.get("/v1/models", responses=documented("Models"))
    async def list_models(request: Request) -> dict[str, Any]:
        """The model, and the adapters that this key may use."""
        cards = model_api.list_models(pipeline, request.state.caller)
        if is_anthropic(request.scope):
            return models_page(cards, request.query_params)
        return {"object": "list", "data": list(map(_card, cards))}

    @router.get("/v1/models/{model:path}", responses=documented("Model"))
    async def retrieve_model(request: Request, model: str) -> dict[str, Any]:
        card = model_api.get_model(pipeline, model, request.state.caller)
        return model_info(card) if is_anthropic(request.scope) else _card(card)

    @router.post(
        "/tokenize",
        responses=documented("Tokens"),
        openapi_extra=body_document(TokenizeChatBody, TokenizeTextBody),
    )
    async def tokenize(request: Request) -> Response:
        document = await read_object(request, limits)
        body: TokenizeChatBody | TokenizeTextBody
        if document.get("messages") is not None:
            body = validated(document, TokenizeChatBody, settings.unknown_fields)
        else:
            body = validated(document, TokenizeTextBody, settings.unknown_fields)
        tokens = await tokenizer_api.tokenize(pipeline, body, _context(request))
        return _json(asdict(tokens), body)

    @router.post(
        "/detokenize", responses=documented("Text"), openapi_extra=body_document(DetokenizeBody)
    )
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody, limits, settings.unknown_fields)
        text = await tokenizer_api.detokenize(pipeline, body, _context(request))
        return _json({"prompt": text}, body)

    @router.get("/tokenizer_info", include_in_schema=False)
    async def tokenizer_info() -> JSONResponse:
        return JSONResponse(await pipeline.models.first.engine.tokenizer_info())

    return router


def _context(request: Request) -> CallContext:
    return CallContext(request.state.request_id, request.state.caller)


def _card(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "packhorse",
        "max_model_len": card.max_model_len,
        **({} if card.parent is None else {"parent": card.parent}),
        **({} if card.runner == "generate" else {"runner": card.runner}),
    }


def _json(document: dict[str, Any], body: LenientBody) -> Response:
    headers = {"x-packhorse-ignored": ", ".join(body.ignored)} if body.ignored else None
    return json_response(document, headers)
