"""The echo engine with answers from a script: reasoning, tool calls, logprobs, failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from packhorse.serve.cache.codec import joined
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.messages import (
    Chunk,
    FinishReason,
    GenerateRequest,
    Prompt,
    Route,
    TokenLogprob,
    ToolCall,
)
from packhorse.serve.settings.engine import EngineSettings

Script = list[Chunk | Exception]


class Scripted(EchoEngine):
    """Answers every request with `script`; keeps the requests. Reads all messages as the prompt, a
    word a token.
    """

    def __init__(self, script: Sequence[Chunk | Exception] = (), delay_s: float = 0) -> None:
        super().__init__(EngineSettings(kind="echo"))
        self.script = list(script)
        self.requests: list[GenerateRequest] = []
        self.pause_s = delay_s

    async def tokenize(self, request: GenerateRequest) -> list[int]:
        return [1] * len(told(request))

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        prompt = await super().render(_as_text(request), route)
        self.requests.append(request)
        return prompt

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        if not self.script:
            async for chunk in super().generate(prompt, request, route):
                yield chunk
            return
        self.running += 1
        try:
            chunks = [part for part in self.script if isinstance(part, Chunk)]
            failure = next((part for part in self.script if isinstance(part, Exception)), None)
            if not request.stream and failure is None:
                await asyncio.sleep(self.pause_s)
                chunks = list(joined(chunks))
            for chunk in chunks:
                await asyncio.sleep(self.pause_s)
                yield chunk
            if failure is not None:
                raise failure
        finally:
            self.running -= 1


def told(request: GenerateRequest) -> list[str]:
    """All words that the model is told."""
    words: list[str] = []
    for message in request.messages or ():
        content = message.get("content") or ""
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        for text in [*texts, message.get("reasoning") or ""]:
            words += text.split()
        for call in message.get("tool_calls") or ():
            words += call["function"]["arguments"].split()
    return words


def _as_text(request: GenerateRequest) -> GenerateRequest:
    return replace(request, messages=None, prompt=" ".join(told(request)))


def text(*parts: str, reason: FinishReason = "stop", **fields: Any) -> Script:
    """A token a part."""
    last = len(parts) - 1
    return [
        Chunk(part, (number,), reason if number == last else None, **fields)
        for number, part in enumerate(parts)
    ]


def thought(*parts: str) -> Script:
    return [Chunk("", (number,), reasoning=part) for number, part in enumerate(parts)]


def call(name: str, *pieces: str, index: int = 0, reason: FinishReason | None = None) -> Script:
    """A tool call: its name, then its arguments in pieces."""
    chunks: Script = [Chunk("", (0,), tool_calls=(ToolCall(index, "", f"call_{index}", name),))]
    chunks += [Chunk("", (0,), tool_calls=(ToolCall(index, piece),)) for piece in pieces]
    if reason is not None:
        chunks.append(Chunk("", (0,), reason, reasoning_tokens=0))
    return chunks


def logprob(token: str, value: float = -0.5) -> TokenLogprob:
    other = TokenLogprob("other", 2, value - 1, 2)
    return TokenLogprob(token, 1, value, 1, (TokenLogprob(token, 1, value, 1), other))
