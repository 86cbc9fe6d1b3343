"""The data that all layers share: what is asked, where it goes, what comes back.

Frozen dataclasses without a word of HTTP, gRPC or vLLM. `rest` builds a GenerateRequest, `service`
and the engines pass these on, `rest` turns Chunks back into bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]

# One chat message in OpenAI's shape (role, content, ...). Kept as given: the engine's own renderer
# reads it.
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. Names and meanings are vLLM's.

    None means the model's own default (its generation_config.json), else vLLM's. Without max_tokens
    an answer may have default_max_tokens, or as many as fit beside the prompt.
    """

    max_tokens: int | None = None
    default_max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request, of either protocol. Exactly one of `messages` (chat) and `prompt` is set.

    `prompt` is text or token ids; `tools` belong to chat. `stream` says whether the caller wants
    chunks as they come or one at the end.
    """

    request_id: str
    model: str
    sampling: Sampling
    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    prompt: str | tuple[int, ...] | None = None
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: a served model and, on top of it, an adapter or none."""

    model: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered request. `engine_input` is whatever the engine that rendered it wants back."""

    token_ids: tuple[int, ...]
    max_tokens: int
    engine_input: Any = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Newly generated text. The last chunk of a stream, and only that, has a finish_reason."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; cached_tokens are the prompt's tokens that the prefix cache held."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
