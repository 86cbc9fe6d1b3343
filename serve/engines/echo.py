"""An engine without a model: it answers with the last message, a word a chunk. For tests of the
code around an engine; never the proof that a feature works.

A word is a token. Some prompts fail on purpose, see `FAULTS`.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from packhorse.serve.engines.base import Capacity, answer_budget
from packhorse.serve.errors import Unavailable
from packhorse.serve.messages import (
    AdapterVersion,
    Chunk,
    EffectiveSampling,
    FinishReason,
    GenerateRequest,
    Prompt,
    Route,
)
from packhorse.serve.settings.engine import EngineSettings

# A prompt that is exactly one of these raises: before the first chunk, or after it.
FAULTS = {
    "!dead": Unavailable,
    "!dead-later": Unavailable,
    "!bug": RuntimeError,
    "!bug-later": RuntimeError,
}


def _text(request: GenerateRequest) -> str:
    """The text to echo: the last message's, or the prompt."""
    if request.messages is not None:
        return str(request.messages[-1].get("content") or "")
    if isinstance(request.prompt, str):
        return request.prompt
    return " ".join(map(str, request.prompt or ()))


def _tokens(text: str) -> list[int]:
    """A word is a token: equal words have equal ids."""
    return [zlib.crc32(word.encode()) >> 1 for word in text.split()]


class EchoEngine:
    """Echoes; counts running requests, so that tests can see an abort arrive."""

    max_model_len = 2048
    capacity = Capacity(
        max_num_seqs=256,
        kv_cache_tokens=256 * 2048,
        max_loras=2,
        max_active_loras=2,
        max_cpu_loras=4,
        max_lora_rank=16,
    )

    def __init__(self, settings: EngineSettings) -> None:
        self._delay_s = settings.echo_delay_s
        self.running = 0
        self.aborted = 0
        self.dead = False
        self.adapters: set[str] = set()

    async def tokenize(self, request: GenerateRequest) -> list[int]:
        return _tokens(_text(request))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        return list(map(str, token_ids))

    async def tokenizer_info(self) -> dict[str, Any]:
        return {"tokenizer_class": "words"}

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        text = _text(request)
        token_ids = _tokens(text)
        budget = answer_budget(request, len(token_ids), self.max_model_len)
        asked = {name: getattr(request.sampling, name) for name in EffectiveSampling._fields}
        effective = EffectiveSampling(
            **{name: value for name, value in asked.items() if value is not None}
        )
        return Prompt(token_ids, budget, text, text, effective, is_lasting=True)

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        text: str = prompt.engine_input
        if route.adapter is not None and route.adapter.engine_name not in self.adapters:
            raise RuntimeError(f"{route.adapter.engine_name} is not loaded")
        self.running += 1
        finished = False
        try:
            if text in FAULTS and not text.endswith("-later"):
                raise FAULTS[text](f"The echo engine was asked to fail with {text}.")
            words = text.split()
            said = words[: prompt.max_tokens]
            for number, word in enumerate(said):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                last = number + 1 == len(said)
                if text in FAULTS:
                    yield Chunk(word, (number,))
                    raise FAULTS[text](f"The echo engine was asked to fail with {text}.")
                reason: FinishReason | None = None
                if last:
                    reason = "stop" if len(said) == len(words) else "length"
                    finished = True
                spaced = word if number == 0 else " " + word
                for index in range(request.sampling.n):
                    yield Chunk(spaced, (number,), reason, index)
        finally:
            self.running -= 1
            self.aborted += not finished

    def has_adapter(self, adapter: AdapterVersion) -> bool:
        return adapter.engine_name in self.adapters

    async def load_adapter(self, adapter: AdapterVersion) -> None:
        self.adapters.add(adapter.engine_name)

    async def unload_adapter(self, adapter: AdapterVersion) -> None:
        self.adapters.remove(adapter.engine_name)

    async def check(self) -> None:
        if self.dead:
            raise Unavailable("The echo engine was told to be dead.")

    async def close(self) -> None:
        self.dead = True
