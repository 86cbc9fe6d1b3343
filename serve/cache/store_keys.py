"""Key names in the shared store: `PREFIX:MODEL:ADAPTER:TENANT:DIGEST`. Model, adapter and tenant
are short hashes, so that the results of one scope can be counted. The epochs have one key of their
own.
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


def epochs_key(prefix: str) -> str:
    return f"{prefix}:epochs"


def store_key(prefix: str, key: Key) -> str:
    """The key name of a result."""
    _, *scopes = key.scopes
    return ":".join((prefix, *map(_short, scopes), key.digest.hex()))


def store_key_pattern(prefix: str, scope: str | None) -> re.Pattern[str]:
    """Matches the key names of a scope's results; None: of all results."""
    place = scope.partition(":")[0] if scope else None
    parts = [_short(scope) if scope and place == p else "[0-9a-f]{8}" for p in _PLACES]
    return re.compile(":".join((re.escape(prefix), *parts, "[0-9a-f]{64}")))
