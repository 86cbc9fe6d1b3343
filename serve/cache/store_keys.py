"""What results are called in a store: `PREFIX:MODEL:ADAPTER:TENANT:DIGEST`, each a short hash, so
that the results of one scope can be counted.
"""

from __future__ import annotations

import functools
import hashlib
import re

from packhorse.serve.cache.key import Key

_PLACES = ("model", "adapter", "tenant")


@functools.lru_cache(maxsize=4096)
def _short(scope: str) -> str:
    return hashlib.sha256(scope.encode()).hexdigest()[:8]


def name_of(prefix: str, key: Key) -> str:
    _, *scopes = key.scopes
    return ":".join((prefix, *map(_short, scopes), key.digest.hex()))


def pattern_of(prefix: str, scope: str | None) -> re.Pattern[str]:
    """Matches the names of a scope's results; None: of all."""
    place = scope.partition(":")[0] if scope else None
    parts = [_short(scope) if scope and place == p else "[0-9a-f]{8}" for p in _PLACES]
    return re.compile(":".join((re.escape(prefix), *parts, "[0-9a-f]{64}")))
