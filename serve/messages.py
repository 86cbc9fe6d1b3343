"""The data that all layers share: what is asked, where it goes, what comes back.

Frozen data without a word of HTTP, gRPC or vLLM. `rest` builds a GenerateRequest, `service` and the
engines pass these on, `rest` turns Chunks back into bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import msgspec

FinishReason = Literal["stop", "length", "tool_calls"]
# What a pooling model makes of a text, in vLLM's words; `token_...`: of each token.
PoolingTask = Literal["embed", "classify", "token_embed", "token_classify"]
# How a pooling model scores two texts, in vLLM's words.
ScoreType = Literal["bi-encoder", "cross-encoder", "late-interaction"]
ToolChoice = Literal["none", "auto", "required", "named"]
RouteStage = Literal["explicit", "rules", "learned", "default"]
Scope = Literal["inference", "admin", "metrics"]
CacheMode = Literal["auto", "always", "refresh", "off"]
# What the result cache had to do with an answer.
CacheStatus = Literal["hit", "miss", "coalesced", "bypass"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

# One chat message in OpenAI's shape (role, content, ...). Kept as given: the engine's own renderer
# reads it.
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like: a JSON schema (`json`), any JSON object, a regular expression,
    one of several strings, or a grammar in EBNF.
    """

    kind: Literal["json", "json_object", "regex", "choice", "grammar"]
    value: Any


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. Names and meanings are vLLM's.

    None means the model's own default (its generation_config.json), else vLLM's. Without max_tokens
    an answer may have default_max_tokens, or as many as fit beside the prompt. `logprobs` is how
    many alternatives to report beside each token's own log-probability (0: none but its own; -1:
    the whole vocabulary), `prompt_logprobs` the same for the prompt.
    """

    max_tokens: int | None = None
    default_max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How messages become a prompt and the answer becomes a message; for chat only.

    `tools` are OpenAI's tool objects, `named_tool` the one that tool_choice="named" asks for.
    `template_variables` go to the chat template as they are.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: ToolChoice = "none"
    named_tool: str | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: tuple[Mapping[str, str], ...] = ()
    template_variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pooling:
    """What a request wants of a pooling model, which generates nothing.

    `task` None is the model's own: a vector a token. `pair` is the second text of a cross-encoder,
    the document to the request's prompt as the query. `dimensions` shortens the embeddings of a
    Matryoshka model. `use_activation` is the last step, which normalizes an embedding and turns
    logits into probabilities; None is the model's own habit. Of too long a text, truncation leaves
    out the end, or the beginning (`truncation_side`: what is left out); a query or a document of a
    pair may have a limit of its own.
    """

    task: PoolingTask | None = None
    pair: str | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    truncation_side: Literal["left", "right"] | None = None
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    param: str = field(default="input", compare=False)
    """The name of the field that holds the text, for error messages."""


@dataclass(frozen=True, slots=True)
class Pooler:
    """What a pooling model can do.

    `score_type` None: it scores no pairs. `labels` are the names of its classes, by number; empty
    where they have none.
    """

    score_type: ScoreType | None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What a caller wants of the result cache.

    `auto`: answers that are repeatable are looked up and kept. `always`: this one too, whatever its
    sampling. `refresh`: it is kept, but not looked up. `off`: neither. An answer from the cache is
    at most `max_age_s` old; None is as old as the server keeps them.
    """

    mode: CacheMode = "auto"
    max_age_s: float | None = None


AUTO_CACHE = CachePolicy()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may. Names are for logs; the key itself is nowhere in here.

    Callers of one `tenant` may see each other's cached answers. `base` is whether they may use the
    base model itself, `adapters` which of them; None is all. A limit of None is none.
    """

    name: str
    tenant: str
    scopes: frozenset[Scope]
    adapters: frozenset[str] | None = None
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None
    requests_per_minute: int | None = None
    base: bool = True


# Everybody, on a server without keys.
ANONYMOUS = Caller("-", "anonymous", frozenset(SCOPES))


class Trace(Protocol):
    """A span of one call that is traced, under which others go. Times are time.monotonic()'s."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        ...

    def span(self, name: str, start_s: float, end_s: float, /, **attributes: Any) -> Trace:
        """Tell of a step that is over. Attributes that are None are left out."""
        ...


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request, of either protocol. Exactly one of `messages` (chat) and `prompt` is set.

    `prompt` is text or token ids. `stream` says whether the caller wants chunks as they come or one
    at the end; `echo` that the prompt's text is wanted too. `add_special_tokens` None is the
    endpoint's habit: no for chat (its template has them), yes for text. A lower `priority` goes
    first. `timeout_s` counts from its arrival at the service; None is the server's own. Requests of
    another `cache_salt` share neither blocks of the engine's prefix cache nor answers with it.
    `ignored` are fields that were sent and have no effect. `trace` is there when the call is
    traced. With `pooling` nothing is generated: the answer is one chunk, with vectors.
    """

    request_id: str
    model: str
    sampling: Sampling
    messages: tuple[Message, ...] | None = None
    chat: ChatOptions = ChatOptions()
    prompt: str | tuple[int, ...] | None = None
    echo: bool = False
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    stream: bool = False
    caller: Caller = ANONYMOUS
    timeout_s: float | None = None
    cache: CachePolicy = AUTO_CACHE
    cache_salt: str | None = None
    pooling: Pooling | None = None
    ignored: tuple[str, ...] = field(default=(), compare=False)
    trace: Trace | None = field(default=None, compare=False, repr=False)

    @property
    def prompt_param(self) -> str:
        """The name of the field that holds the prompt, for error messages."""
        if self.pooling is not None and self.messages is None:
            return self.pooling.param
        return "messages" if self.messages is not None else "prompt"


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One version of an adapter, in a folder of its own that never changes.

    `digest` is the sha256 of its weights and configuration, `int_id` the engine's number for it: no
    other version of this server's life gets the same.
    """

    name: str
    digest: str
    folder: Path
    int_id: int
    rank: int

    @property
    def engine_name(self) -> str:
        """Its own, because vLLM takes adapters of one name for one adapter."""
        return f"{self.name}@{self.digest[:12]}"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: a served model and, on top of it, an adapter or none; and whether the
    request named it, or which stage of routing chose it.

    Only requests with the same `prefix_cache_salt` share blocks of the engine's prefix cache and
    kept answers, see `tenancy`.
    """

    model: str
    adapter: AdapterVersion | None = None
    stage: RouteStage = "explicit"
    prefix_cache_salt: str | None = None

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.adapter.name if self.adapter else self.model


class EffectiveSampling(NamedTuple):
    """The sampling fields that a model may have defaults for, filled in. Names are Sampling's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


NEUTRAL = EffectiveSampling()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered request. `text` is there when the request echoes; `engine_input` is whatever the
    engine that rendered it wants back.

    `is_parsed`: reasoning or tool calls are read out of the answer, for which it matters whether it
    is streamed. `is_lasting`: the same request renders to the same at any other time; a template
    that writes today's date does not. `images` are the SHA-256 digests of its images, for which the
    token ids only keep places. `ignored` are fields of the request that have no effect on this
    model. `when_read` is called by the engine once it has read the prompt, where the first chunk
    would tell so too late: a whole answer has only one.
    """

    token_ids: Sequence[int]
    max_tokens: int
    text: str | None = None
    engine_input: Any = field(default=None, repr=False)
    effective_sampling: EffectiveSampling = NEUTRAL
    is_parsed: bool = False
    is_lasting: bool = False
    images: tuple[bytes, ...] = ()
    ignored: tuple[str, ...] = ()
    when_read: Callable[[], None] | None = field(default=None, repr=False, compare=False)


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """A token's log-probability, and those of the likeliest tokens in its place, best first.

    `rank` counts from 1. `logprob` None: the first token of a prompt, which nothing precedes.
    """

    token: str
    token_id: int
    logprob: float | None
    rank: int | None = None
    top: tuple[TokenLogprob, ...] = ()


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A piece of a tool call, or a whole one. `id` and `name` come with its first piece."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class EngineTimes(NamedTuple):
    """When the engine took a request's steps, in time.monotonic()'s seconds; 0: not at all."""

    queued_s: float
    scheduled_s: float
    first_token_s: float
    last_token_s: float


class Vectors(msgspec.Struct, frozen=True, gc=False):
    """What a pooling model made of a text: `data` is float32, little-endian, row by row. `rows` is
    the number of tokens with a vector each; None: one vector for the whole text.
    """

    data: bytes
    rows: int | None = None


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Newly generated tokens of one choice. The last chunk of each choice, and only that, has a
    finish_reason; `stop_reason` is the stop string or token id that was met. That one may have the
    engine's `times`, too.

    One of these is made per token, hence msgspec: it costs a tenth of a frozen dataclass. None of
    its parts leads back to it, so the collector need not look at those that are kept for others.
    """

    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason | None = None
    index: int = 0
    stop_reason: str | int | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    times: EngineTimes | None = None
    vectors: Vectors | None = None
    """Of a request with `pooling`, whose only chunk this is."""

    @property
    def is_plain(self) -> bool:
        """Nothing but text, of the first choice: what nearly every chunk is."""
        return (
            self.index == 0
            and self.logprobs is None
            and self.reasoning is None
            and not self.tool_calls
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; cached_tokens are the prompt's tokens that the prefix cache held."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
