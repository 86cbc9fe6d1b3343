"""A pipeline with a result cache over an echo engine that counts, and can fail."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.limits.admission import Admission
from packhorse.serve.messages import Chunk, GenerateRequest, Prompt, Route
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.models import Model, Models
from packhorse.serve.pipeline import Pipeline, Stream
from packhorse.serve.settings.admission import AdmissionSettings
from packhorse.serve.settings.engine import EngineSettings


class Counting(EchoEngine):
    """Counts generations, and can fail them."""

    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__(EngineSettings(kind="echo", echo_delay_s=delay_s))
        self.generations = 0
        self.failures: list[Exception] = []
        self.salts: list[str | None] = []

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        self.salts.append(route.prefix_cache_salt)
        return await super().render(request, route)

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        self.generations += 1
        failure = self.failures.pop(0) if self.failures else None
        async for chunk in super().generate(prompt, request, route):
            if failure is not None:
                raise failure
            yield chunk


class Clock:
    """Unix time."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make(
    delay_s: float = 0.0,
    *,
    has_cache: bool = True,
    limits: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Pipeline, Counting]:
    engine = Counting(delay_s)
    known: dict[str, Any] = {"memory_bytes": 2**20, "max_entry_bytes": 2**16, "ttl_s": 60.0}
    metrics = ModelMetrics("echo")
    cache = ResultCache(b"s" * 32, metrics=metrics, **{**known, **options})
    cache.fingerprint = b"model"
    admission = Admission(AdmissionSettings(**(limits or {})))
    model = Model("echo", admission=admission, cache=cache if has_cache else None, metrics=metrics)
    model.attach(engine)
    return Pipeline(Models(model)), engine


async def read(stream: Stream) -> str:
    return "".join([chunk.text async for chunk in stream])


async def answer(pipeline: Pipeline, request: GenerateRequest) -> tuple[str, str]:
    """The mark, and the text."""
    stream = await pipeline.start(request)
    return stream.context.cache_status, await read(stream)
