"""The HTTP application: routes, error handlers, request ids, health and metrics."""

from __future__ import annotations

import json
import re
import uuid

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import metrics
from serve.errors import ServeError
from serve.rest import errors, generate
from serve.service import Service
from serve.settings import HttpSettings

CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """Gives every request an id, the client's own when it sent a harmless one, and returns it in
    `x-request-id`.

    Pure ASGI: Starlette's BaseHTTPMiddleware would hide a client's disconnect.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = sent if CLIENT_ID.fullmatch(sent) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


def build_app(service: Service, settings: HttpSettings) -> FastAPI:
    """The whole HTTP surface over one service."""
    # No /docs page: it would load its scripts from the internet. /openapi.json stays.
    app = FastAPI(title="Packhorse", docs_url=None, redoc_url=None)
    app.add_middleware(RequestIds)
    app.add_exception_handler(ServeError, errors.on_serve_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(Exception, errors.on_unexpected)
    app.include_router(generate.routes(service, max_body_bytes=settings.max_body_bytes))

    @app.get("/v1/models")
    async def list_models() -> dict[str, object]:
        return {"object": "list", "data": [model_card()]}

    def model_card() -> dict[str, object]:
        return {
            "id": service.model,
            "object": "model",
            "created": service.created_s,
            "owned_by": "packhorse",
            "max_model_len": service.engine.max_model_len,
        }

    @app.get("/health/live")
    async def live() -> Response:
        """200 while the process can answer at all."""
        return Response(json.dumps({"status": "live"}), media_type="application/json")

    @app.get("/health/ready")
    async def ready() -> Response:
        """200 while new requests are taken; 503 with the reason otherwise."""
        await service.check_ready()
        return Response(json.dumps({"status": "ready"}), media_type="application/json")

    @app.get("/metrics")
    async def scrape(request: Request) -> Response:
        body, content_type = metrics.exposition()
        return Response(body, media_type=content_type)

    return app
