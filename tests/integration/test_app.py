"""Servers as objects: two of them in one process, driven without a socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve import engine_builder
from packhorse.serve.app import App, create
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.errors import StartupError
from packhorse.serve.settings import Settings
from packhorse.serve.settings.engine import EngineSettings
from packhorse.serve.settings.routing import RoutingSettings
from packhorse.serve.settings.service import ServiceSettings
from tests.integration.serving import until


def settings(name: str, delay_s: float = 0.0) -> Settings:
    return Settings(
        engine=EngineSettings(kind="echo", echo_delay_s=delay_s),
        service=ServiceSettings(served_model_name=name),
    )


@asynccontextmanager
async def running(name: str, delay_s: float = 0.0) -> AsyncIterator[App]:
    app = create(settings(name, delay_s))
    await app.start()
    try:
        yield app
    finally:
        await app.stop()


class Call:
    """One HTTP request, straight into ASGI."""

    def __init__(self, app: App, method: str, path: str, body: Any = None) -> None:
        self.status = 0
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        content = b"" if body is None else json.dumps(body).encode()
        self._incoming.put_nowait({"type": "http.request", "body": content, "more_body": False})
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
            "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
            "state": {},
        }  # fmt: skip
        self.task = asyncio.create_task(app.asgi(scope, self._incoming.get, self._send))  # type: ignore[arg-type]

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.pieces.put_nowait(message.get("body", b""))
            if not message.get("more_body"):
                self.pieces.put_nowait(None)

    def leave(self) -> None:
        """As a client that closes its connection."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def rest(self) -> str:
        """What is left of the body."""
        found = b""
        while (piece := await asyncio.wait_for(self.pieces.get(), 30)) is not None:
            found += piece
        await self.task
        return found.decode()


def chat(app: App, model: str, text: str, **fields: Any) -> Call:
    body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
    return Call(app, "POST", "/v1/chat/completions", body)


async def test_each_serves_its_own_model_and_the_other_is_unknown() -> None:
    async with running("first") as first, running("second") as second:
        for app, name, other in ((first, "first", "second"), (second, "second", "first")):
            call = chat(app, name, "hello")
            answer = json.loads(await call.rest())
            assert (call.status, answer["model"]) == (200, name)
            assert answer["choices"][0]["message"]["content"] == "hello"
            refused = chat(app, other, "hello")
            assert "no model" in await refused.rest()
            assert refused.status == 404


async def test_one_stops_while_the_other_streams() -> None:
    async with running("first", 0.01) as first:
        words = " ".join(f"w{number}" for number in range(60))
        async with running("second", 0.01) as second:
            ending = chat(second, "second", words, stream=True)
            lasting = chat(first, "first", words, stream=True)
            for call in (ending, lasting):
                await asyncio.wait_for(call.pieces.get(), 30)
            await second.stop()
        assert "data: [DONE]" in await ending.rest()
        assert second.pipeline.in_flight == 0
        whole = await lasting.rest()
        assert "w59" in whole
        assert '"finish_reason": "stop"' in whole
        refused = chat(second, "second", "hello")
        await refused.rest()
        assert refused.status == 503


async def test_a_stop_waits_for_what_runs_when_it_may() -> None:
    async with running("first", 0.01) as app:
        call = chat(app, "first", "a b c d e f", stream=True)
        await asyncio.wait_for(call.pieces.get(), 30)
        await app.stop(drain_s=30)
        assert '"finish_reason": "stop"' in await call.rest()


async def test_metrics_are_each_servers_own() -> None:
    async with running("first") as first, running("second") as second:
        for _ in range(3):
            await chat(first, "first", "hello").rest()
        await chat(second, "second", "hello").rest()
        pages = [await Call(app, "GET", "/metrics").rest() for app in (first, second)]
        assert 'packhorse_requests_total{model="first",outcome="ok"} 3.0' in pages[0]
        assert 'packhorse_requests_total{model="second",outcome="ok"} 1.0' in pages[1]
        assert 'model="second"' not in pages[0]
        assert 'model="first"' not in pages[1]


async def test_the_old_names_of_metrics_are_there_for_one_release() -> None:
    async with running("first") as app:
        await chat(app, "first", "hello").rest()
        page = await Call(app, "GET", "/metrics").rest()
        for name, old in (
            ("packhorse_frontend_seconds", "packhorse_before_engine_seconds"),
            ("packhorse_time_to_first_token_seconds", "packhorse_first_token_seconds"),
            ("packhorse_requests_waiting_for_engine", "packhorse_requests_held"),
            ("packhorse_active_loras_per_step", "packhorse_step_adapters"),
        ):
            assert f"# HELP {old} DEPRECATED: renamed to {name};" in page
        assert 'packhorse_frontend_seconds_count{model="first"} 1.0' in page
        assert 'packhorse_before_engine_seconds_count{model="first"} 1.0' in page


async def test_what_is_wrong_with_settings_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    wrong = settings("first").model_copy(
        update={"routing": RoutingSettings(file=tmp_path / "none.yaml")}
    )
    with pytest.raises(StartupError, match="is not a file"):
        create(wrong)


async def test_before_it_is_started_it_lives_and_is_not_ready() -> None:
    app = create(settings("first"))
    live, ready = Call(app, "GET", "/health/live"), Call(app, "GET", "/health/ready")
    await live.rest()
    assert "still loading" in await ready.rest()
    assert (live.status, ready.status) == (200, 503)
    await app.stop()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_noticed_in_any_host(stream: bool) -> None:
    """Ours tells when a connection is lost; others are asked, as ASGI has it."""
    async with running("first", 600) as app:
        call = chat(app, "first", "a b c", stream=stream)
        await until(lambda: app.pipeline.in_flight == 1)
        call.leave()
        await asyncio.wait_for(call.task, 30)
        assert app.pipeline.in_flight == 0
        outcomes = app.model.metrics.requests_by_outcome
        assert outcomes["cancelled"]._value.get() == 1


async def test_a_stop_in_the_middle_of_a_start_leaves_no_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = []

    def slowly(model: str, name: str, settings: EngineSettings, metrics: Any) -> EchoEngine:
        built.append(name)
        time.sleep(0.3)
        return EchoEngine(settings)

    monkeypatch.setitem(engine_builder.ENGINES, "echo", slowly)
    before = asyncio.all_tasks()
    app = create(settings("first"))
    starting = asyncio.create_task(app.start())
    await until(lambda: built == ["first"])
    await app.stop()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await until(lambda: asyncio.all_tasks() <= before)
    assert built == ["first"], "nothing takes the engine for dead, and builds another"
