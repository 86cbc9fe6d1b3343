"""The protocol of an engine, as the pipeline uses it. VllmEngine is the real one; EchoEngine makes
tests quick and fails on purpose.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from packhorse.serve.errors import Invalid
from packhorse.serve.messages import (
    AdapterVersion,
    Chunk,
    GenerateRequest,
    Pooler,
    PoolingTask,
    Prompt,
    Route,
)


@dataclass(frozen=True, slots=True)
class Capacity:
    """How much an engine holds at once: requests in a batch, and tokens in its KV cache."""

    max_num_seqs: int
    kv_cache_tokens: int
    max_loras: int = 0
    """Adapters in one batch; 0: the engine takes no adapters."""
    max_active_loras: int = 0
    """Adapters that may have requests in the engine, though not all in every batch."""
    max_cpu_loras: int = 0
    """Adapters that may be loaded."""
    max_lora_rank: int = 0


class Engine(Protocol):
    """Turns one routed request into a stream of chunks. Closing the stream early aborts the
    request.
    """

    @property
    def max_model_len(self) -> int:
        """The most tokens of a request, prompt and answer together."""
        ...

    @property
    def capacity(self) -> Capacity:
        """How much the engine holds at once; admission derives its limits from it."""
        ...

    @property
    def pooler(self) -> Pooler | None:
        """What a pooling model can do; None: the model generates."""
        ...

    async def tokenize(self, request: GenerateRequest) -> Sequence[int]:
        """The prompt's token ids, however many. Raises Invalid when it does not render."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of the token ids. Raises Invalid for an id outside the vocabulary."""
        ...

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it."""
        ...

    async def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's configuration, and the chat template, as JSON."""
        ...

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        """The request's prompt, for `generate`. Raises Invalid when it is too long or does not
        render, and for a pooling request that the model cannot answer.
        """
        ...

    def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        """The answer, chunk by chunk; closing the generator aborts the request. A request with
        `pooling` has one chunk, with its vectors. Calls `prompt.when_read`, if there is one and the
        engine knows the moment. Raises Invalid on the first step, EngineDied when the engine is
        gone.
        """
        ...

    async def load_adapter(self, adapter: AdapterVersion) -> None:
        """Load the adapter; requests for one that is not loaded are refused. Raises Invalid when
        the engine does not take it, EngineDied when the engine is gone.
        """
        ...

    async def unload_adapter(self, adapter: AdapterVersion) -> None:
        """Unload the adapter, which no request may use any more. Raises EngineDied when the engine
        is gone.
        """
        ...

    async def check(self) -> None:
        """Raises EngineDied when the engine is dead or hung, judged from its progress since the
        last call: call it every second or so.
        """
        ...

    async def close(self) -> None:
        """End every process and free everything; requests that still run end with EngineDied. Safe
        to call twice, and on an engine that hangs.
        """
        ...


def check_kind(engine: Engine, request: GenerateRequest) -> None:
    """Raises Invalid for a request that generates on a pooling model, and the other way round."""
    if request.pooling is not None and engine.pooler is None:
        raise Invalid(
            f"The model {request.model[:80]!r} generates text, and this call needs a pooling model "
            "(embedding, cross-encoder, classifier): serve one beside it on a port of its own, or "
            "serve this one with engine.runner=pooling.",
            param="model",
        )
    if request.pooling is None and engine.pooler is not None:
        raise Invalid(
            f"The model {request.model[:80]!r} is a pooling model and generates no text: call "
            "/v1/embeddings, /v1/rerank, /v1/score, /classify or /pooling, or send this to a "
            "generating model.",
            param="model",
        )


def pooling_task(request: GenerateRequest, tasks: Collection[str]) -> PoolingTask:
    """The task of a pooling request: its own, or else the model's. Raises Invalid when `tasks`, the
    model's, have none.
    """
    asked = request.pooling.task if request.pooling else None
    choices: Sequence[PoolingTask] = (asked,) if asked else ("token_embed", "token_classify")
    for task in choices:
        if task in tasks:
            return task
    raise Invalid(
        f"This model's pooling tasks are {', '.join(sorted(tasks))}, and this call needs "
        f"{' or '.join(choices)}: send it to another model.",
        param="model",
    )


def check_pooling_room(
    request: GenerateRequest, num_prompt_tokens: int, max_model_len: int
) -> None:
    """Raises Invalid for an input without tokens, or with more than the model takes."""
    if num_prompt_tokens == 0:
        raise Invalid("An input is empty; send at least one token.", param=request.prompt_param)
    if num_prompt_tokens > max_model_len:
        raise Invalid(
            f"{TOO_LONG}: This model's maximum context length is {max_model_len} tokens. However, "
            f"an input has {num_prompt_tokens}. Please reduce its length, or send "
            "truncate_prompt_tokens=-1.",
            param=request.prompt_param,
            code="context_length_exceeded",
        )


# Anthropic's words, then OpenAI's and vLLM's: agents look for one or the other in an error, and
# then shorten the conversation.
TOO_LONG = "The prompt is too long"


def answer_budget(request: GenerateRequest, num_prompt_tokens: int, max_model_len: int) -> int:
    """How many tokens the answer may have: at most the request's max_tokens, and at most what the
    prompt leaves of the context. Raises Invalid when that is nothing.
    """
    param = request.prompt_param
    if num_prompt_tokens == 0:
        raise Invalid("The prompt is empty; send at least one token.", param=param)
    room = max_model_len - num_prompt_tokens
    if room <= 0:
        raise Invalid(
            f"{TOO_LONG}: This model's maximum context length is {max_model_len} tokens. However, "
            f"your prompt has {num_prompt_tokens}, which leaves no room for an answer. Please "
            "reduce the length of the prompt.",
            param=param,
            code="context_length_exceeded",
        )
    sampling = request.sampling
    asked = sampling.max_tokens or sampling.default_max_tokens or room
    if sampling.min_tokens > room:
        raise Invalid(
            f"min_tokens={sampling.min_tokens} and the prompt's {num_prompt_tokens} tokens are "
            f"above the model's {max_model_len}; lower min_tokens to {room} or shorten the prompt.",
            param="min_tokens",
        )
    return min(asked, room)
