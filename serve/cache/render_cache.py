"""Prompts of before: a request that was rendered once need not be rendered again to be looked up.

Rendering is most of what an answer from memory costs. Only prompts that last are remembered (see
`Prompt`), as light copies without what the engine wants: what is generated is rendered anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cachetools import LRUCache

from packhorse.serve.cache.key import content_of, rendering_of
from packhorse.serve.messages import GenerateRequest, Prompt

MAX_BYTES = 32 * 2**20
OVERHEAD_BYTES = 600


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt, and what its request asks for."""

    prompt: Prompt
    content: bytes


class Prompts:
    """Those used last."""

    def __init__(self) -> None:
        self._known: LRUCache[bytes, Known] = LRUCache(MAX_BYTES, getsizeof=_size)

    def get(self, request: GenerateRequest, fingerprint: bytes) -> Known | None:
        """`fingerprint` is the engine's: another may render in another way."""
        return self._known.get(fingerprint + rendering_of(request))

    def learn(self, request: GenerateRequest, fingerprint: bytes, prompt: Prompt) -> Known:
        """What `get` answers from now on, if the prompt lasts."""
        known = Known(prompt, content_of(request, prompt))
        if prompt.is_lasting and _size(known) <= MAX_BYTES:
            light = replace(prompt, token_ids=tuple(prompt.token_ids), engine_input=None)
            self._known[fingerprint + rendering_of(request)] = replace(known, prompt=light)
        return known


def _size(known: Known) -> int:
    prompt = known.prompt
    return OVERHEAD_BYTES + 36 * len(prompt.token_ids) + 4 * len(prompt.text or "")
