"""Remembers requests that were in engines when those died: suspects, which run alone, and poison,
which is refused.

Keeps no text and no token ids, but a hash with a secret of this process. It is made of what may end
an engine: the prompt's token ids, the adapter, and what makes the engine run other code than it
does for the prompt alone (constraints, log-probabilities, biases). Fields that clients change when
they ask again are not in it: seed, temperature and its like, max_tokens, n, stop strings,
streaming. Nor is the client: the next engine dies of the request all the same.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from array import array
from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

import msgspec

from packhorse.serve.messages import GenerateRequest, Prompt, Route

POISON = (
    "Two engines have stopped while they worked on this request, at the second one it was the only "
    "suspect; it is not tried again for {ttl_s:g} s. Change it."
)
MOST = 4096  # of each kind; beyond that the oldest are forgotten

Value = TypeVar("Value")

_encode = msgspec.json.Encoder(order="deterministic", enc_hook=str).encode


class Suspicion(NamedTuple):
    """The engines that died with a request inside, or with an equal one, and how many seconds it
    lived in the last of them.
    """

    engines: frozenset[int]
    lived_s: float


class Quarantine:
    """Remembers poison for poison_ttl_s and suspects for suspicion_ttl_s; bounded in number."""

    def __init__(
        self,
        *,
        poison_ttl_s: float,
        suspicion_ttl_s: float,
        most: int = MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.poison_ttl_s = poison_ttl_s
        self._secret = secrets.token_bytes(32)
        self._poison: _Lasting[None] = _Lasting(poison_ttl_s, most, clock)
        self._suspicions: _Lasting[Suspicion] = _Lasting(suspicion_ttl_s, most, clock)

    @property
    def is_empty(self) -> bool:
        """True nearly always; fingerprints need not be made then."""
        return self._poison.is_empty and self._suspicions.is_empty

    def fingerprint(self, prompt: Prompt, request: GenerateRequest, route: Route) -> bytes:
        """16 bytes, the same for requests that an engine can tell apart by chance alone."""
        sampling, chat = request.sampling, request.chat
        constraint = sampling.constraint
        is_forced = chat.tool_choice in ("required", "named")  # a constraint, made of the tools
        parts = (
            route.adapter.digest if route.adapter else None,
            (constraint.kind, constraint.value) if constraint else None,
            (chat.tool_choice, chat.named_tool, chat.tools) if is_forced else None,
            sampling.logprobs,
            sampling.prompt_logprobs,
            sorted(sampling.logit_bias.items()),
            sorted(sampling.bad_words),
            sampling.allowed_token_ids,
            request.pooling.task if request.pooling else None,
        )
        made = hashlib.blake2b(_encode(parts), key=self._secret, digest_size=16)
        made.update(array("q", prompt.token_ids).tobytes())
        made.update(b"".join(prompt.images))
        return made.digest()

    def is_poison(self, fingerprint: bytes) -> bool:
        return fingerprint in self._poison.living()

    def suspicion(self, fingerprint: bytes) -> Suspicion | None:
        return self._suspicions.living().get(fingerprint)

    def add_suspect(self, fingerprint: bytes, engines: frozenset[int], lived_s: float) -> None:
        """The request was in these engines when they died, the last of them after lived_s."""
        known = self.suspicion(fingerprint)
        if known is not None:
            engines |= known.engines
        self._suspicions.put(fingerprint, Suspicion(engines, lived_s))

    def clear(self, fingerprint: bytes) -> None:
        """It is no suspect any more."""
        self._suspicions.drop(fingerprint)

    def add_poison(self, fingerprint: bytes) -> None:
        """An engine died of the request."""
        self._suspicions.drop(fingerprint)
        self._poison.put(fingerprint, None)


class _Lasting(Generic[Value]):
    """A bounded dictionary whose values expire; the oldest go first."""

    def __init__(self, ttl_s: float, most: int, clock: Callable[[], float]) -> None:
        self._ttl_s, self._most, self._clock = ttl_s, most, clock
        self._values: dict[bytes, Value] = {}
        self._until_s: dict[bytes, float] = {}  # in the order of time

    @property
    def is_empty(self) -> bool:
        return not self._values or not self.living()

    def living(self) -> Mapping[bytes, Value]:
        now_s = self._clock()
        while self._until_s:
            oldest, until_s = next(iter(self._until_s.items()))
            if until_s >= now_s and len(self._until_s) <= self._most:
                break
            self.drop(oldest)
        return self._values

    def put(self, key: bytes, value: Value) -> None:
        self.drop(key)
        self._values[key], self._until_s[key] = value, self._clock() + self._ttl_s
        self.living()

    def drop(self, key: bytes) -> None:
        self._values.pop(key, None)
        self._until_s.pop(key, None)
