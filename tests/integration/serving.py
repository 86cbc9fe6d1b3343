"""A whole HTTP server over the echo engine within the test's own event loop: its counters and its
engine can be looked at.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from packhorse.serve.access.keys import Keys
from packhorse.serve.api.admin import Admin
from packhorse.serve.api.responses.service import Responses
from packhorse.serve.cache.response_store import MemoryResponses
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.limits.admission import Admission
from packhorse.serve.metrics import ModelMetrics, ServerMetrics
from packhorse.serve.models import Model, Models
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.rest.app import build_admin_app, build_app
from packhorse.serve.rest.server import Listeners
from packhorse.serve.settings.admission import AdmissionSettings
from packhorse.serve.settings.auth import AuthSettings
from packhorse.serve.settings.engine import EngineSettings
from packhorse.serve.settings.http import HttpSettings
from packhorse.serve.telemetry.tracing import Tracing


@dataclass
class Served:
    """A server that runs, and a client of it."""

    listeners: Listeners
    pipeline: Pipeline
    engine: EchoEngine
    http: httpx.AsyncClient
    metrics: ServerMetrics
    responses: Responses

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listeners.url.rpartition("/")[2].partition(":")
        return host, int(port)


@asynccontextmanager
async def serving(
    *,
    engine: EchoEngine | None = None,
    delay_s: float = 0,
    keys: AuthSettings | None = None,
    limits: dict[str, Any] | None = None,
    http: dict[str, Any] | None = None,
    verify: Any = True,
    clock: Callable[[], float] | None = None,
    admin: Admin | None = None,
    tracing: Tracing | None = None,
    adapters: Any = None,
    routing: Any = None,
    cache: Any = None,
    metrics: ModelMetrics | None = None,
    max_background: int = 8,
    kept: Any = None,
    **options: Any,
) -> AsyncIterator[Served]:
    """`limits` are admission's settings, `http` those of that section; `clock` is for keys and
    quotas, `kept` is the store of
    responses, `options` are the pipeline's.
    """
    settings = HttpSettings(**{"port": 0, **(http or {})})
    clocked: dict[str, Any] = {"clock": clock} if clock else {}
    of_server, counted = ServerMetrics(), metrics or ModelMetrics("echo")
    known = Keys(keys, metrics=of_server, **clocked) if keys else None
    admission = Admission(
        AdmissionSettings(**(limits or {})), metrics=counted, server_metrics=of_server, **clocked
    )
    model = Model(
        "echo", adapters=adapters, routing=routing, cache=cache, admission=admission,
        metrics=counted,
    )  # fmt: skip
    pipeline = Pipeline(Models(model), **options)
    engine = engine or EchoEngine(EngineSettings(kind="echo", echo_delay_s=delay_s))
    kept = kept or MemoryResponses(
        max_entries=100, max_bytes=2**22, max_entry_bytes=2**20, ttl_s=600, metrics=of_server
    )
    responses = Responses(pipeline, kept, max_background=max_background)
    listeners = Listeners(
        settings,
        build_app(
            pipeline, settings, known, admin, tracing, metrics=of_server, responses=responses
        ),
        build_admin_app(pipeline, settings, known, admin, metrics=of_server),
        metrics=of_server,
    )
    listeners.start()
    model.attach(engine)
    limit = httpx.Limits(max_connections=None)
    try:
        async with httpx.AsyncClient(
            base_url=listeners.url, timeout=30, verify=verify, limits=limit
        ) as client:
            yield Served(listeners, pipeline, engine, client, of_server, responses)
    finally:
        await responses.close()
        await kept.close()
        await listeners.stop()


def write_keys(path: Path, **entries: dict[str, Any]) -> AuthSettings:
    """A keys file in which the key of each name is `key-NAME`."""
    document = [
        {"name": name, "sha256": hashlib.sha256(f"key-{name}".encode()).hexdigest(), **fields}
        for name, fields in entries.items()
    ]
    fresh = path.with_suffix(".new")
    fresh.write_text(yaml.safe_dump(document))
    fresh.replace(path)  # as a careful operator does: never half a file, and another inode
    return AuthSettings(keys_file=path)


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer key-{name}"}


async def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 most conditions are counters without an event
            await asyncio.sleep(0.01)


async def until_there(made: Callable[[], Awaitable[bool]], timeout_s: float = 30) -> None:
    """Like `until`, for what has to be asked."""
    async with asyncio.timeout(timeout_s):
        while not await made():  # noqa: ASYNC110 what is asked has no event
            await asyncio.sleep(0.02)


def nothing_left(server: Served) -> Callable[[], bool]:
    """Whether no request is counted anywhere, nor in the engine; for `until`."""
    counted = server.pipeline.admission

    def check() -> bool:
        counts = (
            counted.in_flight, counted.running, counted.waiting, counted.queued_tokens,
            server.engine.running,
        )  # fmt: skip
        return not any(counts)

    return check


class Held(EchoEngine):
    """Says nothing before `go` is set; `held` counts the requests that have come."""

    def __init__(self) -> None:
        super().__init__(EngineSettings(kind="echo"))
        self.go = asyncio.Event()
        self.held = 0
        self.timeouts_s: list[float | None] = []

    async def generate(self, prompt: Any, request: Any, route: Any) -> Any:
        self.held += 1
        self.timeouts_s.append(request.timeout_s)
        await self.go.wait()
        async for chunk in super().generate(prompt, request, route):
            yield chunk
