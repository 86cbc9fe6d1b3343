"""Request fields that chat and plain completions share: OpenAI's, and vLLM's additions.

validation.py says what happens to fields that are not here.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from packhorse.serve.api.validation import LenientBody, Unsupported
from packhorse.serve.errors import Invalid
from packhorse.serve.messages import (
    CacheMode,
    CachePolicy,
    Caller,
    Constraint,
    GenerateRequest,
    Sampling,
)

INT32_MAX = 2**31 - 1  # the engine's own integers have 32 or 64 bits
INT64_MAX = 2**63 - 1

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Field(fail_fast=True, max_length=64)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]


def refuse_half_characters(document: Any) -> None:
    """Raises ValueError for an escaped half of a surrogate pair: valid JSON, but no text."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise ValueError("there is half a character in it") from error


class StreamOptions(LenientBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(LenientBody):
    """OpenAI's named schema. The name and the description have no effect."""

    name: str = Field(max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(LenientBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type 'json_schema' comes with a json_schema")
        return self


class StructuredOutputs(LenientBody):
    """vLLM's form of a constraint: exactly one of these fields."""

    unsupported: ClassVar = {
        "structural_tag": Unsupported((), "send regex or grammar"),
        "whitespace_pattern": Unsupported((), "white space is the server's to bound"),
    }

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1)
    choice: Annotated[list[StopString], Field(fail_fast=True, min_length=1)] | None = None
    grammar: str | None = Field(None, min_length=1)
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar and json_object")
        return self

    @field_validator("json_")
    @classmethod
    def _is_a_schema(cls, value: dict[str, Any] | str | None) -> Any:
        """A schema may be JSON text; it is parsed here, so that its bounds can be checked."""
        if not isinstance(value, str):
            return value
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("the schema's text is not JSON") from error
        if not isinstance(schema, dict):
            raise ValueError("the schema must be a JSON object")
        refuse_half_characters(schema)
        return schema

    def constraint(self) -> Constraint:
        if self.json_ is not None:
            return Constraint("json", self.json_)
        if self.regex is not None:
            return Constraint("regex", self.regex)
        if self.choice is not None:
            return Constraint("choice", tuple(self.choice))
        if self.grammar is not None:
            return Constraint("grammar", self.grammar)
        return Constraint("json_object", True)


GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}


class CacheOptions(LenientBody):
    """How the result cache is used, see docs/caching.md."""

    mode: CacheMode = "auto"
    max_age_s: float | None = Field(None, ge=0)

    def policy(self) -> CachePolicy:
        return CachePolicy(self.mode, self.max_age_s)


_TOOLS = "send tools and tool_choice, their present form"
_CONSTRAINT = "send structured_outputs or response_format"


class GenerateBody(LenientBody):
    """The fields that chat and plain completions share."""

    unsupported: ClassVar = {
        "best_of": Unsupported((1,), "send n, and choose among the answers"),
        "use_beam_search": Unsupported((False,), "leave it out, or send n"),
        "suffix": Unsupported(("",), "put the text that follows into the prompt"),
        "functions": Unsupported(([],), _TOOLS),
        "function_call": Unsupported(("none", "auto"), _TOOLS),
        "audio": Unsupported((), "this server answers in text"),
        "web_search_options": Unsupported((), "this server does not search"),
        "chat_template": Unsupported((), "templates are the server's to choose"),
        "prompt_embeds": Unsupported(([],), "send text or token ids"),
        "logits_processors": Unsupported(([],), "use logit_bias, bad_words or structured_outputs"),
        "logprob_token_ids": Unsupported(([],), "send logprobs"),
        "thinking_token_budget": Unsupported((-1,), "send max_tokens"),
        "truncation_side": Unsupported(("left",), "the end of a prompt is kept here"),
        "repetition_detection": Unsupported(({},), "send repetition_penalty"),
        "watermarking": Unsupported((False,), "leave it out"),
        "vllm_xargs": Unsupported(({},), "leave it out"),
        "kv_transfer_params": Unsupported(({},), "prefill and decode run in one engine here"),
        "ec_transfer_params": Unsupported(({},), "prefill and decode run in one engine here"),
    }
    no_effect: ClassVar = frozenset(
        ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
    )

    model: str | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=-1, le=INT64_MAX)
    """The limit on answer tokens; -1: as many as fit in the context."""
    min_tokens: int = Field(0, ge=0, le=INT32_MAX)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), le=INT64_MAX)
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=64)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Annotated[dict[str, float], Field(fail_fast=True, max_length=1024)] | None = None
    bad_words: Annotated[list[StopString], Field(fail_fast=True, max_length=256)] | None = None
    allowed_token_ids: TokenIds | None = None
    prompt_logprobs: int | None = Field(None, ge=-1, le=INT32_MAX)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=INT32_MAX)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int = Field(0, ge=-(2**63), le=INT64_MAX)
    timeout_s: float | None = Field(None, gt=0)
    cache: CacheOptions | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @classmethod
    def reshaped(cls, document: dict[str, Any]) -> dict[str, Any]:
        """vLLM's older names for a constraint (`guided_json` ...) as `structured_outputs`."""
        if not GUIDED.keys() & document.keys():
            return document
        guided = {
            kind: document[name] for name, kind in GUIDED.items() if document.get(name) is not None
        }
        kept = {name: value for name, value in document.items() if name not in GUIDED}
        constraint = kept.get("structured_outputs") or {}
        if guided and isinstance(constraint, dict):
            kept["structured_outputs"] = {**constraint, **guided}
        return kept

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError("the keys must be token ids")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GenerateBody:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs are not streamed; leave out one of the two")
        plain = self.response_format is None or self.response_format.type == "text"
        if not plain and self.structured_outputs is not None:
            raise ValueError("send either response_format or structured_outputs, not both")
        if self.seed is not None and self.seed > INT64_MAX - (self.n or 1):
            raise ValueError("with n choices the seeds are seed to seed+n-1; choose a lower seed")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def max_answer_tokens(self) -> int | None:
        """The limit on answer tokens; None: as many as fit, or the endpoint's default."""
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def constraint(self) -> Constraint | None:
        """The constraint on the answer, from `structured_outputs` or `response_format`."""
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_schema" and wanted.json_schema is not None:
            return Constraint("json", wanted.json_schema.schema_)
        return Constraint("json_object", True)

    def sampling(
        self,
        max_tokens: int | None,
        *,
        default_max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> Sampling:
        """The sampling fields as sent. Raises Invalid when they contradict each other."""
        n, temperature, top_k, top_p = self.n or 1, self.temperature, self.top_k, self.top_p
        if top_p == 0:  # means the most likely token alone; engines take top_k=1 for that
            temperature, top_k, top_p = (0.0 if n == 1 else temperature), 1, None
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise Invalid(
                f"min_tokens={self.min_tokens} is above max_tokens={max_tokens}; lower it.",
                param="min_tokens",
            )
        allowed = self.allowed_token_ids
        return Sampling(
            max_tokens=max_tokens,
            default_max_tokens=default_max_tokens,
            min_tokens=self.min_tokens,
            n=n,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            # -1 means "random" in vLLM, for clients that cannot omit the field.
            seed=None if self.seed == -1 else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            logit_bias={
                int(token): max(-100.0, min(100.0, bias))
                for token, bias in (self.logit_bias or {}).items()
            },
            bad_words=tuple(self.bad_words or ()),
            allowed_token_ids=None if allowed is None else tuple(allowed),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=self.constraint(),
        )

    def request(
        self,
        request_id: str,
        sampling: Sampling,
        caller: Caller,
        timeout_s: float | None,
        cache: CachePolicy,
        default_model: str,
    ) -> GenerateRequest:
        """The request without its prompt or messages, which the endpoint adds."""
        return GenerateRequest(
            request_id,
            self.model or default_model,
            sampling,
            ignored=self.ignored,
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            priority=self.priority,
            stream=bool(self.stream),
            caller=caller,
            timeout_s=timeout_s,
            cache=cache,
            cache_salt=self.cache_salt,
        )
