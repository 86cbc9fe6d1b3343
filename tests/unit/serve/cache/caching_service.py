"""A service with a result cache over an echo engine that counts, and can fail."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.limits.admission import Admission
from packhorse.serve.messages import Chunk, GenerateRequest, Prompt, Route
from packhorse.serve.service import Service
from packhorse.serve.settings.sections import AdmissionSettings, EngineSettings
from packhorse.serve.stream import Stream


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
    delay_s: float = 0.0, *, limits: dict[str, Any] | None = None, **options: Any
) -> tuple[Service, Counting]:
    engine = Counting(delay_s)
    known: dict[str, Any] = {"memory_bytes": 2**20, "max_entry_bytes": 2**16, "ttl_s": 60.0}
    cache = ResultCache(b"s" * 32, **{**known, **options})
    cache.identity = b"model"
    admission = Admission(AdmissionSettings(**(limits or {})))
    service = Service("echo", admission=admission, cache=cache)
    service.attach(engine)
    return service, engine


async def read(stream: Stream) -> str:
    return "".join([chunk.text async for chunk in stream])


async def answer(service: Service, request: GenerateRequest) -> tuple[str, str]:
    """The mark, and the text."""
    stream = await service.start(request)
    return stream.mark, await read(stream)
