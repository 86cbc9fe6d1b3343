"""Side doors: other ways of writing a path, other endpoints of vLLM's, WebSockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.access.keys import Keys
from packhorse.serve.models import Model, Models
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.rest.middleware import Access
from packhorse.serve.settings.auth import AuthSettings
from tests.client import CHAT
from tests.integration.serving import Served, bearer, serving, write_keys
from tests.integration.strangers import keyless, own_address, raw, status_of

SIDE_DOORS = [
    "/invocations", "//admin/adapters", "/%61dmin/adapters", "/admin/", "/admin", "/ADMIN",
    "/Admin/adapters", "/admin/adapters/", "/admin//adapters", "/metrics/", "//metrics",
    "/%6detrics", "/health/../admin/cache", "/health/%2e%2e/admin/cache", "/health//admin/cache",
    "/./admin/adapters", "/admin;x/adapters", "/admin%2fadapters", "/v1/../admin/adapters",
    "/admin/cache%0A", "/metrics%0A", "/server_info%0A", "/v1/load_lora_adapter%0A", "/admin%0D",
    "/v1/unload_lora_adapter%0a", "/%0Aadmin/cache", "/admin/%09cache", "/metrics%00",
    "/docs", "/load", "/server_info", "/reset_prefix_cache", "/v1/load_lora_adapter",
]  # fmt: skip


# For whoever has a key; SageMaker's path gets no body here.
OWN_ANSWERS = {"/invocations": {400, 405}, "/load": {200, 405}}
OPEN = {"/%6detrics", "/metrics/", "/load"}


async def test_side_doors_need_a_key(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", user={"scopes": ["inference"]})
    async with serving(keys=keys) as server:
        for path in SIDE_DOORS:
            for method in ("GET", "POST"):
                length = "content-length: 0"
                line = f"{method} {path} HTTP/1.1"
                answer = await raw(server.address, line, "host: x", length)
                # /health and what is below it is open, and has nothing but health.
                expected = {401, 404, 405} if path.startswith("/health/") else {401}
                assert status_of(answer) in expected, (method, path)
                key = bearer("user")["authorization"]
                answer = await raw(server.address, line, "host: x", length, f"authorization: {key}")
                allowed = OWN_ANSWERS.get(path, {403, 404, 405})
                assert status_of(answer) in allowed, (method, path)


async def test_side_doors_without_keys_lead_nowhere() -> None:
    address = own_address()
    async with keyless(http={"host": "0.0.0.0"}) as server:
        for path in SIDE_DOORS:
            line = f"GET {path} HTTP/1.1"
            answer = await raw((address, server.address[1]), line, "host: localhost")
            allowed = {200} if path in OPEN else {403, 404, 405}
            assert status_of(answer) in allowed, path


HANDSHAKE = [
    "host: localhost", "upgrade: websocket", "sec-websocket-version: 13",
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
]  # fmt: skip


async def handshake(server: Served, path: str, *lines: str) -> bytes:
    reader, writer = await asyncio.open_connection(*server.address)
    asked = [f"GET {path} HTTP/1.1", *HANDSHAKE, "connection: Upgrade", *lines, "", ""]
    writer.write("\r\n".join(asked).encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    writer.close()
    return head


async def test_a_websockets_handshake_is_a_plain_request(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", user={})
    key = f"authorization: {bearer('user')['authorization']}"
    async with serving(keys=keys) as server:
        for path, without, with_key in [
            (CHAT, 401, 405), ("/admin/cache", 401, 403), ("/", 401, 404),
            ("/health/live", 200, 200), ("/v1/models", 401, 200),
        ]:  # fmt: skip
            assert status_of(await handshake(server, path)) == without, path
            assert status_of(await handshake(server, path, key)) == with_key, path


async def test_a_page_opens_no_websocket_to_operators_calls() -> None:
    async with keyless() as server:
        for path in ("/admin/cache", "/admin/adapters"):
            page = "origin: http://evil.example"
            assert status_of(await handshake(server, path, page)) == 403


@pytest.mark.parametrize("with_keys", [True, False])
async def test_what_is_no_request_is_not_passed_on(tmp_path: Path, *, with_keys: bool) -> None:
    auth = write_keys(tmp_path / "keys.yaml", user={}) if with_keys else AuthSettings()
    reached = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    app = Access(inner, Pipeline(Models(Model("echo"))), Keys(auth))
    for path in ("/admin/cache", "/health", "/metrics", CHAT):
        scope = {"type": "websocket", "path": path, "headers": [], "subprotocols": []}
        await app(scope, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}] * 4
    with pytest.raises(RuntimeError, match="'webtransport' are not served"):
        await app({"type": "webtransport", "path": "/health", "headers": []}, receive, send)
    await app({"type": "lifespan"}, receive, send)
    assert reached == ["lifespan"]
