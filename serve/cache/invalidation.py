"""Invalidation by epochs: every cache key contains the epochs of its scopes, and a flush raises
one, so that older results are not found any more.

An epoch is a time-ordered id. There is one for everything, and one for each model, adapter or
tenant that was ever flushed alone. They are stored in the shared store under one key, so that
either all of them are there or none. Each replica keeps the highest epochs that it has seen and
writes them back: a store that has lost them, or returned with old ones, revives no flushed result.
A store without epochs gets a new one for everything, which flushes everything; a default value
could match old results.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from packhorse.serve.cache.key import EVERYTHING

_EPOCH = re.compile(r"[0-9a-f]{16}")


def validate_epochs(epochs: Any) -> dict[str, str]:
    """The epochs from a store, if they are valid. Raises ValueError."""
    if not isinstance(epochs, dict) or not all(
        isinstance(scope, str) and isinstance(epoch, str) and _EPOCH.fullmatch(epoch)
        for scope, epoch in epochs.items()
    ):
        raise ValueError("no epochs")
    return epochs


class Epochs:
    """The highest epochs that this replica has seen, by scope."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives Unix time in seconds."""
        self._clock = clock
        self.seen: dict[str, str] = {}

    def of(self, scopes: Iterable[str]) -> list[str]:
        """The part of a key for these scopes. A scope without an epoch is empty; that cannot match
        a result from before a flush, since a new epoch for everything removes all others.
        """
        seen = self.seen
        return [seen.get(scope, "") for scope in scopes]

    def bump(self, scope: str) -> None:
        """Flush a scope: set a new epoch above all that were seen, as another replica's clock may
        be ahead.
        """
        now = int(self._clock() * 1e6)
        highest = max((int(epoch, 16) for epoch in self.seen.values()), default=0)
        self.merge({scope: f"{max(now, highest + 1):016x}"})

    def merge(self, others: Mapping[str, str]) -> bool:
        """Take over higher epochs. True if any was higher."""
        old = self.seen
        seen = {**old, **{s: epoch for s, epoch in others.items() if epoch > old.get(s, "")}}
        floor = seen.get(EVERYTHING, "")
        self.seen = {s: epoch for s, epoch in seen.items() if epoch >= floor}
        return self.seen != old
