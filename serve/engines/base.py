"""What the service asks of an engine. VllmEngine is the real one; EchoEngine is for speed and for
faults.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from serve.messages import Chunk, GenerateRequest, Prompt, Route


class Engine(Protocol):
    """Turns one routed request into a stream of chunks. Closing the stream early aborts the
    request.
    """

    @property
    def max_model_len(self) -> int:
        """Most tokens, prompt and answer together."""
        ...

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        """Token ids of the request. Raises Invalid when it is too long or does not render."""
        ...

    def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        """The answer, chunk by chunk. Raises Invalid on the first step, Unavailable when the engine
        is gone.
        """
        ...

    async def check(self) -> None:
        """Raises Unavailable when the engine cannot serve."""
        ...

    async def close(self) -> None:
        """Free everything. Called after the drain; safe to call twice."""
        ...
