"""What makes two requests equal: a digest over everything that decides an answer.

Two requests with the same key get the same answer, so anything that is not in here is shared:
whether it is streamed (except where the answer is parsed, which differs), deadlines, priorities,
request ids, which of a tenant's API keys asked.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any

import msgspec

from packhorse.serve.messages import (
    ChatOptions,
    EffectiveSampling,
    GenerateRequest,
    Prompt,
    Route,
    Sampling,
)

# Changes when the meaning of the parts below does.
VERSION = b"packhorse-result-2"

# Of Sampling: written in another form below, or decided by `Prompt`.
_ELSEWHERE = {
    "max_tokens", "default_max_tokens", "stop_token_ids", "allowed_token_ids", "bad_words",
    "logit_bias", "constraint", *EffectiveSampling._fields,
}  # fmt: skip
_as_sent = attrgetter(*(f.name for f in fields(Sampling) if f.name not in _ELSEWHERE))
_encoder = msgspec.msgpack.Encoder(enc_hook=repr)


class Unkeyable(Exception):
    """A request that has no bytes of its own: integers beyond 64 bits, halves of characters."""


def _encode(parts: Any) -> bytes:
    try:
        return _encoder.encode(parts)
    except (OverflowError, ValueError, TypeError, RecursionError) as error:
        raise Unkeyable(str(error)) from error


EVERYTHING = "all"


def model_scope(name: str) -> str:
    return f"model:{name}"


def adapter_scope(name: str) -> str:
    return f"adapter:{name}"


def tenant_scope(mark: bytes) -> str:
    return f"tenant:{mark.hex()}"


@dataclass(frozen=True, slots=True)
class Key:
    """`digest` is what a result is stored under, `scopes` the flushes that make it void."""

    digest: bytes
    scopes: tuple[str, ...]


def may_be_repeatable(request: GenerateRequest) -> bool:
    """Whether it could be, as far as can be told before it is rendered."""
    sampling = request.sampling
    return not sampling.temperature or sampling.seed is not None


def leaves_sampling_open(request: GenerateRequest) -> bool:
    """Whether the model's defaults alone decide if the answer is repeatable."""
    sampling = request.sampling
    return request.pooling is None and sampling.temperature is None and sampling.seed is None


def is_repeatable(request: GenerateRequest, prompt: Prompt) -> bool:
    """Whether the model says the same each time: greedy, or from a seed of the request's own that
    the engine honours (some values mean "random" to it).
    """
    if request.pooling is not None:
        return True
    effective = prompt.effective_sampling
    seeded = request.sampling.seed is not None and effective.seed is not None
    return effective.temperature == 0 or seeded


def scopes_of(route: Route, tenant: bytes) -> tuple[str, ...]:
    """The scopes of a request's result."""
    adapter = route.adapter.name if route.adapter else ""
    return EVERYTHING, model_scope(route.model), adapter_scope(adapter), tenant_scope(tenant)


def digest_of(
    route: Route, content: bytes, *, fingerprint: bytes, salt: str, epochs: Sequence[str]
) -> bytes:
    """32 bytes. `content` is `content_of` the request; `fingerprint` is the model's and its
    engine's, `salt` says who may share (see `tenancy`), `epochs` what flushes have made of it.
    """
    adapter = route.adapter.digest if route.adapter else None
    parts = (VERSION, fingerprint, salt, epochs, route.model, adapter, content)
    return hashlib.blake2b(_encode(parts), digest_size=32).digest()


def content_of(request: GenerateRequest, prompt: Prompt) -> bytes:
    """What is asked, as 32 bytes.

    Order and defaults: fields are taken by name from what the schema has made of them, with what
    the engine has filled in for those left out. What means a set is sorted. A JSON schema is not:
    the order of its properties is the order in which the model writes them.
    """
    sampling, effective = request.sampling, prompt.effective_sampling
    if effective.temperature == 0:
        # These have no effect then; engines may leave them as sent.
        effective = effective._replace(top_p=1.0, top_k=0, min_p=0.0, seed=None)
    constraint = sampling.constraint
    parts = (
        array("q", prompt.token_ids).tobytes(),
        prompt.max_tokens,
        *(() if request.pooling is None else (replace(request.pooling, param=""),)),
        tuple(effective._replace(top_k=max(effective.top_k, 0))),  # vLLM takes -1 for all, too
        _as_sent(sampling),
        sorted(set(sampling.stop_token_ids)),
        None if sampling.allowed_token_ids is None else sorted(set(sampling.allowed_token_ids)),
        sorted(set(sampling.bad_words)),
        sorted(sampling.logit_bias.items()),
        (constraint.kind, constraint.value) if constraint else None,
        _parsing(request) if prompt.is_parsed else None,
        *prompt.images,
    )
    return hashlib.blake2b(_encode(parts), digest_size=32).digest()


def rendering_of(request: GenerateRequest) -> bytes:
    """All that a prompt is made of, its tenant and the client's salt, so that nobody can tell from
    the time that it takes what another has asked.
    """
    parts = (
        request.messages,
        request.prompt,
        request.chat,
        request.sampling,
        request.echo,
        request.add_special_tokens,
        request.truncate_prompt_tokens,
        request.priority,
        request.caller.tenant,
        request.cache_salt,
        request.stream,
        request.pooling,
    )
    return hashlib.blake2b(_encode(parts), digest_size=32).digest()


def _parsing(request: GenerateRequest) -> list[Any]:
    """What decides how an answer is read. vLLM's parsers differ for streams, in where they put
    white space for instance.
    """
    options = request.chat
    plain = [getattr(options, f.name) for f in fields(ChatOptions) if f.name not in _NESTED]
    return [request.stream, plain, options.tools, sorted(options.template_variables.items())]


_NESTED = {"tools", "template_variables"}
