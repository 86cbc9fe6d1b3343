"""Pooling models over the echo engine, and what to ask of each of their endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.messages import Chunk
from packhorse.serve.settings.engine import EngineSettings

EMBED = "/v1/embeddings"
RERANK = "/v1/rerank"
CALLS: dict[str, dict[str, Any]] = {
    EMBED: {"input": ["one two", "two three"]},
    "/embeddings": {"input": "one two"},
    "/rerank": {"query": "one", "documents": ["one two", "three"]},
    RERANK: {"query": "one", "documents": ["one two", {"text": "three"}]},
    "/v2/rerank": {"model": "echo", "query": "one", "documents": ["one two"], "top_n": 1},
    "/score": {"text_1": "one", "text_2": ["one two", "three"]},
    "/v1/score": {"queries": ["one"], "documents": "one two"},
    "/pooling": {"input": "one two"},
    "/v1/pooling": {"input": ["one"], "task": "embed"},
}
"""What an embedding model answers. /classify needs a classifier."""


def settings(**fields: Any) -> EngineSettings:
    return EngineSettings(kind="echo", runner="pooling", **fields)


def embedder(**fields: Any) -> EchoEngine:
    return EchoEngine(settings(**fields))


def cross_encoder() -> EchoEngine:
    return EchoEngine(settings(convert="classify"))


class Counting(EchoEngine):
    """Counts what reaches it; texts that begin with `slow` wait for `go`."""

    def __init__(self) -> None:
        super().__init__(settings())
        self.go = asyncio.Event()
        self.seen = 0

    async def generate(self, prompt: Any, request: Any, route: Any) -> AsyncGenerator[Chunk, None]:
        self.seen += 1
        if str(request.prompt).startswith("slow"):
            self.running += 1
            try:
                await self.go.wait()
            finally:
                self.running -= 1
        async for chunk in super().generate(prompt, request, route):
            yield chunk
