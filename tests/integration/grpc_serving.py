"""One service behind HTTP and gRPC, within the test's own event loop, and requests for both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from packhorse.serve.access.keys import Keys
from packhorse.serve.api.admin import Admin
from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.rpc.server import RpcServer
from packhorse.serve.settings.rpc import RpcSettings
from tests.client import CHAT, TEXT, events
from tests.integration.serving import Served, serving
from tests.protocol_parity import (
    Failed,
    as_message,
    failed_in_grpc,
    metadata,
    method,
    said_in_json,
    said_in_messages,
)


@dataclass
class Twins:
    """One service behind both protocols."""

    served: Served
    rpc: RpcServer
    channel: grpc.aio.Channel

    async def ask(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        """Over gRPC: what was said, or the error."""
        name, message = as_message(path, body)
        return await self.send(name, message, **headers)

    async def send(self, name: str, message: Any, **headers: str) -> Any:
        call = method(self.channel, name)(message, metadata=metadata(headers))
        try:
            if name.endswith("Stream"):
                return said_in_messages([chunk async for chunk in call])
            return said_in_messages([await call])
        except grpc.aio.AioRpcError as error:
            return failed_in_grpc(error)

    async def ask_http(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        options = {"stream_options": {"include_usage": True}} if body.get("stream") else {}
        response = await self.served.http.post(path, json={**body, **options}, headers=headers)
        if response.status_code != 200:
            error = response.json()["error"]
            after = response.headers.get("retry-after")
            retry_s = None if after is None else float(after)
            words = error["type"], error["code"]
            return Failed("", error["kind"], error["message"], error["param"], retry_s, words)
        return said_in_json(events(response) if body.get("stream") else [response.json()])


@asynccontextmanager
async def twins(
    *, rpc: dict[str, Any] | None = None, keys: Any = None, cache: bool = False, **options: Any
) -> AsyncIterator[Twins]:
    results = None
    if cache:
        results = ResultCache(b"s" * 32, memory_bytes=2**20, max_entry_bytes=2**16, ttl_s=60)
    admin = Admin(cache=results, model="echo")
    async with serving(keys=keys, admin=admin, cache=results, **options) as served:
        settings = RpcSettings(**{"port": 0, **(rpc or {})})
        known, tracing = None, options.get("tracing")
        if keys:
            known = Keys(keys, metrics=served.metrics)
        server = RpcServer(served.pipeline, admin, known, settings, tracing, metrics=served.metrics)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield Twins(served, server, channel)
        finally:
            await server.stop(0)


def chat(text: str = "one two three", **fields: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": text}]
    return CHAT, {"model": "echo", "messages": messages, **fields}


def text(prompt: Any = "one two three", **fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"model": "echo", "prompt": prompt, **fields}
