"""What the service asks of an engine. VllmEngine is the real one; EchoEngine is for speed and for
faults.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from packhorse.serve.errors import Invalid
from packhorse.serve.messages import AdapterVersion, Chunk, GenerateRequest, Prompt, Route


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine holds at once: answers in a batch, and tokens in its KV cache."""

    max_num_seqs: int
    kv_cache_tokens: int
    max_loras: int = 0
    """Adapters in one batch; 0: it takes none."""
    loras_at_work: int = 0
    """Adapters that may have requests in it, not all in every batch."""
    max_cpu_loras: int = 0
    """Adapters that are loaded."""
    max_lora_rank: int = 0


class Engine(Protocol):
    """Turns one routed request into a stream of chunks. Closing the stream early aborts the
    request.
    """

    @property
    def max_model_len(self) -> int:
        """Most tokens, prompt and answer together."""
        ...

    @property
    def capacity(self) -> Capacity:
        """What it holds at once, for limits on what is sent to it."""
        ...

    async def tokenize(self, request: GenerateRequest) -> Sequence[int]:
        """Token ids of the request, however many. Raises Invalid when it does not render."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Their text. Raises Invalid for an id outside the vocabulary."""
        ...

    async def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it."""
        ...

    async def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's configuration, and the chat template, as JSON."""
        ...

    async def render(self, request: GenerateRequest, route: Route) -> Prompt:
        """Token ids of the request. Raises Invalid when it is too long or does not render."""
        ...

    def generate(
        self, prompt: Prompt, request: GenerateRequest, route: Route
    ) -> AsyncGenerator[Chunk, None]:
        """The answer, chunk by chunk. Raises Invalid on the first step, EngineDied when the engine
        is gone.
        """
        ...

    async def load_adapter(self, adapter: AdapterVersion) -> None:
        """Have it ready for requests; those that are routed to one that is not are refused. Raises
        Invalid when the engine does not take it, EngineDied when the engine is gone.
        """
        ...

    async def unload_adapter(self, adapter: AdapterVersion) -> None:
        """Free it. No request may use it any more. Raises EngineDied when the engine is gone."""
        ...

    async def check(self) -> None:
        """Raises EngineDied when the engine is dead or hung, judged from its progress since the
        last check: call it every second or so.
        """
        ...

    async def close(self) -> None:
        """End every process and free everything; what still runs ends with EngineDied. Safe to call
        twice, and on an engine that hangs.
        """
        ...


# The words of Anthropic, then of OpenAI and vLLM: agents look for one or another of them, and then
# shorten the conversation.
TOO_LONG = "The prompt is too long"


def answer_budget(request: GenerateRequest, num_prompt_tokens: int, max_model_len: int) -> int:
    """How many tokens the answer may have: what the request says is an upper bound, and so is what
    the prompt leaves of the context. Raises Invalid when that is nothing.
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
