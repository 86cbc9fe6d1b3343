"""The HTTP application: routes, error handlers, request ids, health and metrics."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import metrics
from serve.admin import Admin
from serve.auth import Keys
from serve.errors import ServeError
from serve.rest import admin as operators
from serve.rest import documents, errors, generate, tokens
from serve.rest.access import Access
from serve.sections import HttpSettings
from serve.service import Service, request_id_from

logger = logging.getLogger("packhorse.http")


class RequestIds:
    """Gives every request an id, the client's own when it sent a harmless one; returns it in
    `x-request-id`. Logs what nobody caught, with that id.

    Pure ASGI: Starlette's BaseHTTPMiddleware would hide a client's disconnect.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = request_id_from(sent.decode("latin-1"))
        # A stream takes the server's own `send`, which the framework wraps several times.
        scope.setdefault("state", {}).update(request_id=request_id, send=send)
        header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # the edge: the framework has answered 500 and passes it on to be logged
            logger.exception("request_id=%s failed unexpectedly", request_id)


def build_app(
    service: Service,
    settings: HttpSettings,
    keys: Keys | None = None,
    admin: Admin | None = None,
) -> ASGIApp:
    """The HTTP surface over one service; without /metrics and /admin when these have a port of
    their own. `keys` None: everybody may do everything.
    """
    app = _bare_app(service)
    for endpoints in (generate, tokens):
        app.include_router(endpoints.routes(service, settings))
    documents.add_schemas(app, None if service.has_adapters else service.model)
    if settings.admin_port is None:
        _add_operators_routes(app, service, settings, admin)
    return _wrapped(app, service, settings, keys)


def build_admin_app(
    service: Service,
    settings: HttpSettings,
    keys: Keys | None = None,
    admin: Admin | None = None,
) -> ASGIApp | None:
    """What is on the operators' own port; None when they have none."""
    if settings.admin_port is None:
        return None
    app = _bare_app(service)
    documents.add_schemas(app, None)
    _add_operators_routes(app, service, settings, admin)
    return _wrapped(app, service, settings, keys)


def _bare_app(service: Service) -> FastAPI:
    """Errors and health."""
    # No /docs page: it would load its scripts from the internet. /openapi.json stays.
    app = FastAPI(title="Packhorse", docs_url=None, redoc_url=None)
    app.add_exception_handler(ServeError, errors.on_serve_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(Exception, errors.on_unexpected)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """200 while the process can answer at all."""
        return {"status": "live"}

    @app.get("/health/ready", responses=documents.answers("Status"))
    async def ready() -> dict[str, str]:
        """200 while new requests are taken; 503 with the reason otherwise."""
        await service.check_ready()
        return {"status": "ready"}

    return app


def _add_operators_routes(
    app: FastAPI, service: Service, settings: HttpSettings, admin: Admin | None
) -> None:
    app.include_router(operators.routes(admin or Admin(), settings))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        try:
            await service.check_ready()
            metrics.READY.set(1)
        except ServeError:
            metrics.READY.set(0)
        body, content_type = metrics.exposition()
        return Response(body, media_type=content_type)


def _wrapped(app: ASGIApp, service: Service, settings: HttpSettings, keys: Keys | None) -> ASGIApp:
    """From the inside out: access; CORS, whose preflights carry no key; request ids, so that even a
    500 has one.
    """
    app = Access(app, service, keys)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    return RequestIds(app)
