"""An engine without a model: it answers with the last message, a word a chunk. For tests of what is
around an engine.

A word is a token. Prompts that ask for it fail on purpose, see `FAULTS`. Never the proof that a
feature works.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from serve.engines.base import answer_budget
from serve.errors import Unavailable
from serve.messages import Chunk, GenerateRequest, Prompt, Route
from serve.settings import EngineSettings

# A prompt that is exactly one of these raises: before the first chunk, or after it.
FAULTS = {
    "!dead": Unavailable,
    "!dead-later": Unavailable,
    "!bug": RuntimeError,
    "!bug-later": RuntimeError,
}


class EchoEngine:
    """Echoes; counts what runs, so that tests can see an abort arrive."""

    max_model_len = 2048

    def __init__(self, settings: EngineSettings) -> None:
        self._delay_s = settings.echo_delay_s
        self.running = 0
        self.aborted = 0
        self.dead = False

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        if request.messages is not None:
            text = str(request.messages[-1].get("content") or "")
        else:
            text = (
                request.prompt
                if isinstance(request.prompt, str)
                else " ".join(map(str, request.prompt or ()))
            )
        words = text.split()
        return Prompt(
            tuple(range(len(words))),
            answer_budget(request, len(words), self.max_model_len),
            engine_input=text,
        )

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        text: str = prompt.engine_input
        self.running += 1
        finished = False
        try:
            if text in FAULTS and not text.endswith("-later"):
                raise FAULTS[text](f"The echo engine was asked to fail with {text}.")
            words = text.split()
            for index, word in enumerate(words[: prompt.max_tokens]):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                last = index + 1 == min(len(words), prompt.max_tokens)
                reason = ("length" if prompt.max_tokens < len(words) else "stop") if last else None
                if text in FAULTS:
                    yield Chunk(word, 1)
                    raise FAULTS[text](f"The echo engine was asked to fail with {text}.")
                finished = last
                yield Chunk(word if index == 0 else " " + word, 1, reason)  # type: ignore[arg-type]
        finally:
            self.running -= 1
            self.aborted += not finished

    async def check(self) -> None:
        if self.dead:
            raise Unavailable("The echo engine was told to be dead.")

    async def close(self) -> None:
        self.dead = True
