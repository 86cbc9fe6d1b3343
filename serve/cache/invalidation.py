"""Flushes: epochs that are part of every key, so that a flush puts what came before out of reach.

An epoch is a time-ordered id. There is one for everything, and one more for each model, adapter or
tenant that was ever flushed by itself. They live in the shared store, all under one key: either all
of them are there, or none. Replicas keep the highest that they have seen and write it back, so a
store that has lost them, or came back with old ones, revives nothing. A store that has none gets a
fresh one for everything, which makes all that came before void: never a default, which old results
might have too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from packhorse.serve.cache.key import EVERYTHING

_EPOCH = re.compile(r"[0-9a-f]{16}")


def checked(epochs: Any) -> dict[str, str]:
    """What a store has, if that is what it can be. Raises ValueError."""
    if not isinstance(epochs, dict) or not all(
        isinstance(scope, str) and isinstance(epoch, str) and _EPOCH.fullmatch(epoch)
        for scope, epoch in epochs.items()
    ):
        raise ValueError("no epochs")
    return epochs


class Epochs:
    """The highest that this replica has seen, by scope."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives Unix time in seconds."""
        self._clock = clock
        self.seen: dict[str, str] = {}

    def of(self, scopes: Iterable[str]) -> list[str]:
        """What goes into a key. Absent ones are empty, which no result of before has: with every
        fresh epoch of everything, all others count as absent.
        """
        seen = self.seen
        return [seen.get(scope, "") for scope in scopes]

    def bump(self, scope: str) -> None:
        """A fresh epoch, above all that were seen: another replica's clock may be ahead."""
        now = int(self._clock() * 1e6)
        highest = max((int(epoch, 16) for epoch in self.seen.values()), default=0)
        self.merge({scope: f"{max(now, highest + 1):016x}"})

    def merge(self, others: Mapping[str, str]) -> bool:
        """Take over what is higher. Whether anything was."""
        old = self.seen
        seen = {**old, **{s: epoch for s, epoch in others.items() if epoch > old.get(s, "")}}
        floor = seen.get(EVERYTHING, "")
        self.seen = {s: epoch for s, epoch in seen.items() if epoch >= floor}
        return self.seen != old
