"""The learned stage: one flat table of coefficients, and when it says nothing.

A text's features (see `text`) are weighed by how rare they are, brought to length 1, and multiplied
with one column of coefficients per class: each adapter, and "none" for what the base should answer
itself. An adapter is chosen when its score is above 0, above all others, and by more than its own
threshold; otherwise the stage abstains. Features that training never saw count towards the length:
the more of a text is unknown, the nearer all its scores are to "no".

Made by `fitting` in the training process; called by `cascade`. bench/routing.py says what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray
from packhorse.serve.routing.text import of_run, of_token, pieces

# Scores of as many adapters go into an explanation.
EXPLAINED = 3
# Words of which a table remembers the features: most of most texts are met again.
REMEMBERED = 8192


class TableData(msgspec.Struct, frozen=True):
    """A table as it travels: arrays are float32, little-endian, C order.

    `adapters` are the first columns of `coefficients` (features x classes); where `has_none`, one
    more column follows. `unseen_rarity` is the weight of a feature that is not in `vocabulary`.
    """

    adapters: list[str]
    has_none: bool
    vocabulary: list[str]
    rarity: bytes
    unseen_rarity: float
    coefficients: bytes
    intercepts: list[float]
    thresholds: list[float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the learned stage makes of a text. `adapter` None: it abstains.

    `best` is the adapter it would take, `margin` by how much (the smaller of its score and its lead
    over the next class), `threshold` what the margin must be above. `scores` are all adapters',
    best first; above 0 means "rather this one's than not".
    """

    adapter: str | None
    best: str
    margin: float
    threshold: float
    scores: list[tuple[str, float]]


class Table:
    """Scores texts. What it says never changes, so one may be used while the next is made."""

    def __init__(self, data: TableData) -> None:
        self.adapters = tuple(data.adapters)
        self.thresholds = dict(zip(data.adapters, data.thresholds, strict=True))
        self._rows = {name: row for row, name in enumerate(data.vocabulary)}
        self._remembered: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        self._rarity = np.frombuffer(data.rarity, "<f4")
        self._unseen_square = data.unseen_rarity**2
        classes = len(data.adapters) + data.has_none
        self._coefficients = np.frombuffer(data.coefficients, "<f4").reshape(-1, classes)
        self._intercepts = np.array(data.intercepts, np.float32)

    def score(self, text: str) -> NDArray[np.float32]:
        """One score per class: the adapters in their order, then "none" if it was trained."""
        rows, unseen = self._found(text)
        if not rows:
            return self._intercepts.copy()
        known = np.fromiter(rows, np.intp, len(rows))
        weights = self._rarity[known]
        square = float(weights @ weights) + unseen * self._unseen_square
        scores: NDArray[np.float32] = weights @ self._coefficients.take(known, 0)
        return scores / np.float32(math.sqrt(square)) + self._intercepts

    def _found(self, text: str) -> tuple[set[int], int]:
        """Rows of the text's features, and how many features are in no row: `text.features`, looked
        up word by word.
        """
        tokens, runs = pieces(text)
        rows: set[int] = set()
        unseen: set[str] = set()
        for token in set(tokens):
            here = self._remembered.get(token)
            if here is None:
                here = self._look_up(of_token(token))
                if len(self._remembered) >= REMEMBERED:
                    self._remembered.clear()
                self._remembered[token] = here
            rows.update(here[0])
            unseen.update(here[1])
        for run in runs:
            known, unknown = self._look_up(of_run(run))
            rows.update(known)
            unseen.update(unknown)
        return rows, len(unseen)

    def _look_up(self, found: Iterable[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        rows = self._rows
        known = tuple([rows[feature] for feature in found if feature in rows])
        return known, tuple([feature for feature in found if feature not in rows])

    def judge(self, text: str) -> Verdict:
        """Which adapter, by which margin, and whether that is enough."""
        scores = self.score(text)
        order = np.argsort(-scores[: len(self.adapters)], kind="stable").tolist()
        best = order[0]
        top = float(scores[best])
        scores_of_others = np.delete(scores, best)
        lead = top - float(scores_of_others.max()) if len(scores_of_others) else math.inf
        name = self.adapters[best]
        margin = min(top, lead)
        threshold = self.thresholds[name]
        return Verdict(
            adapter=name if margin > threshold else None,
            best=name,
            margin=margin,
            threshold=threshold,
            scores=[
                (self.adapters[at], value)
                for at, value in zip(order, scores[order].tolist(), strict=True)
            ],
        )
