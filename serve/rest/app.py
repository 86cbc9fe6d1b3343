"""The HTTP application: routes, error handlers, request ids, health and metrics."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response
from packhorse.serve import metrics
from packhorse.serve.access.exposure import Exposure
from packhorse.serve.access.keys import Keys
from packhorse.serve.api.admin import Admin
from packhorse.serve.errors import ServeError
from packhorse.serve.rest import admin as operators
from packhorse.serve.rest import errors, generate, openapi, path_aliases, tokenize
from packhorse.serve.rest.access import Access, Guard
from packhorse.serve.rest.http_methods import Manners
from packhorse.serve.service import Service, request_id_from
from packhorse.serve.settings.sections import HttpSettings
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from packhorse.serve.telemetry.tracing import CallSpan, Tracing

logger = logging.getLogger("packhorse.http")


class RequestIds:
    """Gives every request an id, the client's own when it sent a harmless one; returns it in
    `x-request-id`. Logs what nobody caught, with that id. When there is tracing, gives calls to
    /v1 a span, and returns it in `traceparent`.

    Pure ASGI: Starlette's BaseHTTPMiddleware would hide a client's disconnect.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = request_id_from(sent.decode("latin-1"))
        # A stream takes the server's own `send`, which the framework wraps several times.
        scope.setdefault("state", {}).update(request_id=request_id, send=send)
        headers = [(b"x-request-id", request_id.encode())]
        status = 499  # a client that left before there was an answer
        span = None
        if self._tracing is not None and scope["path"].startswith("/v1/"):
            span = scope["state"]["trace"] = self._begin(self._tracing, scope, request_id)
            headers.append((b"traceparent", span.traceparent.encode()))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # the edge: the framework has answered 500 and passes it on to be logged
            logger.exception("request_id=%s failed unexpectedly", request_id)
        finally:
            if span is not None:
                # Paths that nobody knows are anybody's invention, and no name for a span.
                route = getattr(scope.get("route"), "path", None)
                span.end(
                    f"{scope['method']} {route}" if route else scope["method"],
                    failed=status >= 500,
                    **{"http.route": route, "http.response.status_code": status},
                )

    def _begin(self, tracing: Tracing, scope: Scope, request_id: str) -> CallSpan:
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"][:256],
            "packhorse.request_id": request_id,
        }
        return tracing.begin(scope["method"], scope["headers"], **attributes)


def build_app(
    service: Service,
    settings: HttpSettings,
    keys: Keys | None = None,
    admin: Admin | None = None,
    tracing: Tracing | None = None,
) -> ASGIApp:
    """The HTTP surface over one service; without /metrics and /admin when these have a port of
    their own. `keys` None: everybody may do everything.
    """
    app = _bare_app(service)
    for endpoints in (generate, tokenize):
        app.include_router(endpoints.routes(service, settings))
    app.include_router(path_aliases.routes(service))
    openapi.add_schemas(app, None if service.models.has_adapters else service.model)
    if settings.admin_port is None:
        _add_operators_routes(app, service, settings, admin)
    return _wrapped(app, service, settings, keys, tracing)


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
    openapi.add_schemas(app, None)
    _add_operators_routes(app, service, settings, admin)
    return _wrapped(app, service, settings, keys, own_listener=settings.admin_host)


def _bare_app(service: Service) -> FastAPI:
    """Errors and health."""
    # No /docs page: it would load its scripts from the internet. /openapi.json stays.
    app = FastAPI(title="Packhorse", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(ServeError, errors.on_serve_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(Exception, errors.on_unexpected)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """200 while the process can answer at all."""
        return {"status": "live"}

    @app.get("/health", include_in_schema=False)
    @app.get("/health/ready", responses=openapi.answers("Status"))
    async def ready() -> dict[str, str]:
        """200 while new requests are taken; 503 with the reason otherwise. /health is vLLM's name
        for it, which gateways' manifests have.
        """
        await service.check_ready()
        return {"status": "ready"}

    return app


def _add_operators_routes(
    app: FastAPI, service: Service, settings: HttpSettings, admin: Admin | None
) -> None:
    for endpoints in (operators.routes, path_aliases.operators_routes):
        app.include_router(endpoints(admin or Admin(), settings, service.admission.bodies))

    # A thread of its own: a driver that hangs in a scrape must not hold up what loads engines.
    scrapes = ThreadPoolExecutor(1, "scrape")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        try:
            await service.check_ready()
            metrics.READY.set(1)
        except ServeError:
            metrics.READY.set(0)
        # Written in a thread: it takes milliseconds, which streams need not wait for in one piece.
        loop = asyncio.get_running_loop()
        body, content_type = await loop.run_in_executor(scrapes, metrics.exposition)
        return Response(body, media_type=content_type)


def _wrapped(
    app: ASGIApp,
    service: Service,
    settings: HttpSettings,
    keys: Keys | None,
    tracing: Tracing | None = None,
    *,
    own_listener: str | None = None,
) -> ASGIApp:
    """From the inside out: access; CORS, whose preflights carry no key; without keys, the guard of
    operators' calls; request ids, so that even a 500 has one; HEAD and slashes, for all of them.
    """
    app = Access(app, service, keys)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("*",),
            expose_headers=(
                "x-request-id",
                "retry-after",
                "traceparent",
                "x-packhorse-ignored",
                "x-packhorse-max-tokens",
                "x-packhorse-cache",
                "x-packhorse-model",
            ),
        )
    if keys is not None and keys.without_keys is not None:
        exposure = Exposure(
            keys.without_keys,
            allowed_hosts=settings.allowed_hosts,
            cors_origins=settings.cors_origins,
            own_listener=own_listener,
        )
        app = Guard(app, service, exposure)
    return Manners(RequestIds(app, tracing))
