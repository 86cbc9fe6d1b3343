"""Requests, prompts and keys for tests of the cache."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from packhorse.serve.cache.key import Key, content_of, digest_of
from packhorse.serve.messages import (
    AdapterVersion,
    CachePolicy,
    Caller,
    EffectiveSampling,
    GenerateRequest,
    Prompt,
    Route,
    Sampling,
)

GREEDY = EffectiveSampling(temperature=0.0)


def caller(tenant: str, **fields: Any) -> Caller:
    return Caller(f"key-of-{tenant}", tenant, frozenset({"inference"}), **fields)


def ask(
    text: str = "one two three",
    *,
    tenant: str = "anonymous",
    mode: Any = "auto",
    max_age_s: float | None = None,
    stream: bool = False,
    model: str = "echo",
    **sampling: Any,
) -> GenerateRequest:
    """Greedy, unless it says otherwise."""
    return GenerateRequest(
        "id",
        model,
        Sampling(**{"temperature": 0.0, **sampling}),
        messages=({"role": "user", "content": text},),
        caller=caller(tenant),
        cache=CachePolicy(mode, max_age_s),
        stream=stream,
    )


def version(name: str = "clinic", digest: str = "a" * 64) -> AdapterVersion:
    return AdapterVersion(name, digest, Path("/nowhere"), 1, 8)


def digest(
    request: GenerateRequest | None = None,
    route: Route | None = None,
    prompt: Prompt | None = None,
    **fields: Any,
) -> bytes:
    known: dict[str, Any] = {"fingerprint": b"model", "salt": "t" * 32, "epochs": ["", "", ""]}
    content = content_of(
        request or ask(), prompt or Prompt((1, 2, 3), 10, effective_sampling=GREEDY)
    )
    return digest_of(route or Route("echo"), content, **{**known, **fields})


def key(number: int, *, adapter: str = "", tenant: str = "00") -> Key:
    scopes = ("all", "model:echo", f"adapter:{adapter}", f"tenant:{tenant}")
    return Key(number.to_bytes(32, "big"), scopes)


async def settled() -> None:
    """Everything has gone on as far as it gets without time: a step of the loop needs none, and no
    chain here is as long as this.
    """
    for _ in range(100):
        await asyncio.sleep(0)
