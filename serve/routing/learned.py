"""The learned stage: a linear classifier over text features that may abstain.

A text's features (see `text`) are weighted by inverse document frequency, normalised to length 1,
and multiplied with one column of coefficients per class: each adapter, and "none" for texts that
the base should answer. An adapter is chosen when its score is above 0, above all other classes, and
its margin is above its own threshold; otherwise the stage abstains. Features that training never
saw count towards the length: the more of a text is unknown, the lower all its scores are.

Trained by `train` in the training process; called by `cascade`. bench/routing.py measures its cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from packhorse.serve.routing.text import run_features, token_features, tokenize

# The number of adapters whose scores are in an explanation.
EXPLAINED = 3
# Words whose features a table caches: most words of most texts come again.
REMEMBERED = 8192


class TableData(msgspec.Struct, frozen=True):
    """A serialised table: arrays are float32, little-endian, C order.

    `adapters` name the first columns of `coefficients` (features x classes); with `has_none`, one
    more column follows. `rarity` are the features' inverse document frequencies, `unseen_rarity` is
    that of a feature that is not in `vocabulary`.
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
    """The learned stage's result for a text. `adapter` None: it abstains.

    `best` is the adapter with the highest score, `margin` the smaller of that score and its lead
    over the next class, `threshold` the value that the margin must exceed. `scores` are those of
    all adapters, best first; above 0 means that the text rather belongs to the adapter.
    """

    adapter: str | None
    best: str
    margin: float
    threshold: float
    scores: list[tuple[str, float]]


class Table:
    """Scores texts. Immutable, so it can be used while the next table is trained."""

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
        """The rows of the text's features, and the number of features without a row. The same
        features as those of `text.features`, looked up word by word.
        """
        tokens, runs = tokenize(text)
        rows: set[int] = set()
        unseen: set[str] = set()
        for token in set(tokens):
            here = self._remembered.get(token)
            if here is None:
                here = self._look_up(token_features(token))
                if len(self._remembered) >= REMEMBERED:
                    self._remembered.clear()
                self._remembered[token] = here
            rows.update(here[0])
            unseen.update(here[1])
        for run in runs:
            known, unknown = self._look_up(run_features(run))
            rows.update(known)
            unseen.update(unknown)
        return rows, len(unseen)

    def _look_up(self, found: Iterable[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        rows = self._rows
        known = tuple([rows[feature] for feature in found if feature in rows])
        return known, tuple([feature for feature in found if feature not in rows])

    def judge(self, text: str) -> Verdict:
        """The best adapter, its margin, and whether that is above the threshold."""
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
