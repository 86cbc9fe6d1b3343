"""An engine without a model: it answers with the last message, a word a chunk. For tests of the
code around an engine; never the proof that a feature works.

A word is a token. Some prompts fail on purpose, see `FAULTS`.

With `engine.runner: pooling` it is an embedding model instead: texts that share words have similar
vectors. With `engine.convert: classify` too it is a cross-encoder: its score is the share of the
query's words that the document has.
"""

from __future__ import annotations

import asyncio
import math
import struct
import zlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from packhorse.serve.engines.base import (
    Capacity,
    answer_budget,
    check_pooling_room,
    pooling_task,
)
from packhorse.serve.errors import Invalid, Unavailable
from packhorse.serve.messages import (
    AdapterVersion,
    Chunk,
    EffectiveSampling,
    FinishReason,
    GenerateRequest,
    Pooler,
    Pooling,
    PoolingTask,
    Prompt,
    Route,
    Vectors,
)
from packhorse.serve.settings.engine import EngineSettings

# A prompt that is exactly one of these raises: before the first chunk, or after it.
FAULTS = {
    "!dead": Unavailable,
    "!dead-later": Unavailable,
    "!bug": RuntimeError,
    "!bug-later": RuntimeError,
}


POOLERS = {
    "embed": (Pooler("bi-encoder"), ("embed", "token_embed")),
    "classify": (Pooler("cross-encoder", ("relevant",)), ("classify", "token_classify")),
}
DIMENSIONS = 16


def echoed_text(request: GenerateRequest) -> str:
    """The text to echo: the last message's, or the prompt."""
    if request.messages is not None:
        content = request.messages[-1].get("content") or ""
        if isinstance(content, str):
            return content
        return "\n".join(part.get("text", "") for part in content)
    if isinstance(request.prompt, str):
        return request.prompt
    return " ".join(map(str, request.prompt or ()))


def _tokens(text: str) -> list[int]:
    """A word is a token: equal words have equal ids."""
    return [zlib.crc32(word.encode()) >> 1 for word in text.split()]


def _vector(tokens: Sequence[int], dimensions: int) -> list[float]:
    """The sum of the tokens' own vectors, of length 1."""
    summed = [0.0] * DIMENSIONS
    for token in tokens:
        bits = zlib.crc32(token.to_bytes(8, "little"))
        summed = [
            value + (1.0 if bits >> place & 1 else -1.0) for place, value in enumerate(summed)
        ]
    kept = summed[:dimensions]
    length = math.sqrt(sum(value * value for value in kept)) or 1.0
    return [value / length for value in kept]


def _pooled(task: PoolingTask, pooling: Pooling, tokens: Sequence[int]) -> Vectors:
    dimensions = pooling.dimensions or DIMENSIONS
    if task == "embed":
        rows = [_vector(tokens, dimensions)]
    elif task == "token_embed":
        rows = [_vector([token], dimensions) for token in tokens]
    else:
        document = set(_tokens(pooling.pair or ""))
        query = tokens if pooling.pair is None else tokens[: len(tokens) - len(document)]
        share = sum(token in document for token in query) / max(1, len(query))
        rows = [[share]] * (len(tokens) if task == "token_classify" else 1)
    flat = [value for row in rows for value in row]
    data = struct.pack(f"<{len(flat)}f", *flat)
    return Vectors(data, len(rows) if task.startswith("token_") else None)


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
        self.pooler: Pooler | None = None
        self._tasks: tuple[str, ...] = ()
        if settings.runner == "pooling":
            kind = (settings.model_extra or {}).get("convert", "embed")
            self.pooler, self._tasks = POOLERS[kind]
        self.running = 0
        self.aborted = 0
        self.dead = False
        self.adapters: set[str] = set()

    async def tokenize(self, request: GenerateRequest) -> list[int]:
        return _tokens(echoed_text(request))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        return list(map(str, token_ids))

    async def tokenizer_info(self) -> dict[str, Any]:
        return {"tokenizer_class": "words"}

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        text = echoed_text(request)
        token_ids = _tokens(text)
        if request.pooling is not None:
            return self._pooling_prompt(request, request.pooling, token_ids)
        budget = answer_budget(request, len(token_ids), self.max_model_len)
        asked = {name: getattr(request.sampling, name) for name in EffectiveSampling._fields}
        effective = EffectiveSampling(
            **{name: value for name, value in asked.items() if value is not None}
        )
        return Prompt(token_ids, budget, text, text, effective, is_lasting=True)

    def _pooling_prompt(
        self, request: GenerateRequest, pooling: Pooling, token_ids: list[int]
    ) -> Prompt:
        if isinstance(request.prompt, tuple):
            token_ids = list(request.prompt)
        token_ids = token_ids + _tokens(pooling.pair or "")
        if request.truncate_prompt_tokens is not None:
            limit = request.truncate_prompt_tokens
            token_ids = token_ids[: self.max_model_len if limit == -1 else limit]
        check_pooling_room(request, len(token_ids), self.max_model_len)
        task = pooling_task(request, self._tasks)
        if pooling.dimensions is not None and not 1 <= pooling.dimensions <= DIMENSIONS:
            raise Invalid(
                f"dimensions={pooling.dimensions} is not between 1 and this model's {DIMENSIONS}.",
                param="dimensions",
            )
        return Prompt(token_ids, 0, engine_input=(echoed_text(request), task), is_lasting=True)

    async def _pool(self, prompt: Prompt, pooling: Pooling) -> Chunk:
        text, task = prompt.engine_input
        self.running += 1
        finished = False
        try:
            if text in FAULTS:
                raise FAULTS[text](f"The echo engine was asked to fail with {text}.")
            await asyncio.sleep(self._delay_s)
            finished = True
        finally:
            self.running -= 1
            self.aborted += not finished
        return Chunk("", (), "stop", vectors=_pooled(task, pooling, prompt.token_ids))

    async def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        if request.pooling is not None:
            yield await self._pool(prompt, request.pooling)
            return
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
