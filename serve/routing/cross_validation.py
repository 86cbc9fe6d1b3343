"""Cross-validation of the learned table: folds, thresholds from held-out scores, the self-test.

Similarly worded prompts are in the same fold: otherwise "the dose of X" would be tested by a model
that has seen "the dose of Y", and every threshold would be too low. In addition, each class is left
out once, and its prompts are scored by a model that never saw the class: they stand for topics that
no example covers. Works on arrays only; called by `train`, in the training process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from packhorse.serve.routing.text import word_set

FOLDS = 5
# Above this number of examples training would take too long: a sample, and fewer folds.
SMALL = 2000
SAMPLE, SAMPLE_FOLDS = 4000, 3
# Prompts are similarly worded if the Jaccard similarity of their word sets is at least this.
LIKE_WORDING = 0.5
# The share of right routes that thresholds may give up to keep unknown topics out.
UNKNOWN_COST = 0.02

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
NONE = "none"


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """Scores (examples x classes) by models that saw neither the example nor a similarly worded
    one.

    `classes` and `folds` are one number per example; the class after the last adapter is "none".
    `wordings` is the number of groups of similar wording in each class; `unknown` are scores by
    models that saw no example of the class.
    """

    classes: Integers
    folds: Integers
    wordings: list[int]
    scores: Floats
    unknown: Floats | None


class AdapterTest(msgspec.Struct, frozen=True):
    """Results of an adapter's held-out examples, as shares of them. `wordings`: the number of
    groups of similar wording.
    """

    examples: int
    wordings: int
    right: float
    wrong: float
    abstained: float
    threshold: float


class SelfTest(msgspec.Struct, frozen=True):
    """Shares of all held-out examples of adapters; `none_sent` of the examples of "none",
    `unknown_sent` of prompts whose class the model never saw. `confusions`: (own class, class sent
    to, count).
    """

    tested: int
    right: float
    wrong: float
    abstained: float
    none_sent: float | None
    unknown_sent: float
    adapters: dict[str, AdapterTest]
    confusions: list[tuple[str, str, int]]


def group_by_wording(texts: Sequence[str]) -> Integers:
    """A group number per text. A text joins the group whose first text is most similar to it, so
    that groups cannot merge by chains of similar texts.
    """
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    sets = [word_set(text) for text in texts]
    columns = {word: at for at, word in enumerate(sorted(frozenset().union(*sets)))}
    starts = np.cumsum([0, *map(len, sets)])
    at = np.array([columns[word] for found in sets for word in found], np.int64)
    matrix = csr_matrix((np.ones(len(at)), at, starts), shape=(len(sets), max(1, len(columns))))
    common = np.asarray((matrix @ matrix.T).todense())
    sizes = np.diff(starts)
    alike = common / np.maximum(sizes[:, None] + sizes[None, :] - common, 1)
    groups = np.zeros(len(sets), np.int64)
    leaders: list[int] = []
    for number in range(len(sets)):
        likest = int(np.argmax(alike[number, leaders])) if leaders else -1
        if likest >= 0 and alike[number, leaders[likest]] >= LIKE_WORDING:
            groups[number] = likest
        else:
            groups[number] = len(leaders)
            leaders.append(number)
    return groups


def assign_folds(groups: Integers, num_folds: int) -> Integers:
    """A fold per example. Whole groups, the largest first, go into the emptiest fold; if all
    examples are in one group, they are distributed one by one.
    """
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        return np.arange(len(groups)) % num_folds
    folds = np.zeros(len(groups), np.int64)
    filled = np.zeros(num_folds)
    for group in np.argsort(-sizes, kind="stable"):
        fold = int(filled.argmin())
        folds[groups == group] = fold
        filled[fold] += sizes[group]
    return folds


def margins_of(scores: Floats, num_adapters: int) -> tuple[Integers, Floats]:
    """The best adapter per row and its margin, defined as in Table.judge."""
    best = scores[:, :num_adapters].argmax(1)
    rows = np.arange(len(scores))
    top = scores[rows, best]
    rest = scores.copy()
    rest[rows, best] = -np.inf
    return best, np.minimum(top, top - rest.max(1))


def threshold_for(margins: Floats, allowed: float) -> float:
    """The smallest threshold, at least 0, that at most `allowed` of the margins exceed."""
    ordered = np.sort(margins)[::-1]
    return max(0.0, float(ordered[int(allowed)])) if len(ordered) > int(allowed) else 0.0


def split(texts: Sequence[str], classes: Integers) -> tuple[Integers, Integers, list[int]]:
    """The examples to use (a sample, evenly over the classes), the fold of each, and the number of
    groups of similar wording in each class.
    """
    k = int(classes.max()) + 1
    rng = np.random.default_rng(0)
    is_small = len(texts) <= SMALL
    num_folds = FOLDS if is_small else SAMPLE_FOLDS
    most = len(texts) if is_small else max(20, SAMPLE // k)
    chosen: list[Integers] = []
    folds: list[Integers] = []
    wordings: list[int] = []
    for number in range(k):
        own = np.flatnonzero(classes == number)
        if len(own) > most:
            own = np.sort(rng.choice(own, most, replace=False))
        chosen.append(own)
        groups = group_by_wording([texts[at] for at in own])
        folds.append(assign_folds(groups, num_folds))
        wordings.append(int(groups.max()) + 1)
    return np.concatenate(chosen), np.concatenate(folds), wordings


def thresholds(
    held_out: HeldOutScores, num_adapters: int, rate: float, among: NDArray[np.bool_] | None = None
) -> list[float]:
    """One threshold per adapter, so that wrong routes to it are at most `rate` of its own examples,
    and all adapters together get at most `rate` of unknown topics. `among` masks the examples.
    """
    mask = np.ones(len(held_out.classes), bool) if among is None else among
    classes = held_out.classes[mask]
    best, margins = margins_of(held_out.scores[mask], num_adapters)
    unknown_best, unknown = best, np.full(len(best), -np.inf)
    if held_out.unknown is not None:
        unknown_best, unknown = margins_of(held_out.unknown[mask], num_adapters)
    found = []
    for adapter in range(num_adapters):
        own = classes == adapter
        sent = best == adapter
        lowest = threshold_for(margins[sent & ~own], rate * own.sum())
        for_unknown = threshold_for(
            unknown[unknown_best == adapter], rate * len(unknown) / num_adapters
        )
        right = margins[sent & own]
        dear = float(np.quantile(right, UNKNOWN_COST)) if len(right) else 0.0
        found.append(max(lowest, min(for_unknown, dear)))
    return found


def self_test(
    held_out: HeldOutScores, names: Sequence[str], final: Sequence[float], rate: float
) -> SelfTest:
    """Route every held-out example, with thresholds from the other folds. `final` are the
    thresholds that will be served, for the report.
    """
    num_adapters, count = len(names), len(held_out.classes)
    best, margins = margins_of(held_out.scores, num_adapters)
    sent = np.full(count, num_adapters)
    unknown_sent = np.zeros(count, bool)
    for fold in range(int(held_out.folds.max()) + 1):
        here = held_out.folds == fold
        limits = np.array(thresholds(held_out, num_adapters, rate, among=~here))
        sent[here] = np.where(margins > limits[best], best, num_adapters)[here]
        if held_out.unknown is not None:
            unknown_best, unknown = margins_of(held_out.unknown, num_adapters)
            unknown_sent[here] = (unknown > limits[unknown_best])[here]
    classes = held_out.classes
    adapters = {}
    for number, name in enumerate(names):
        own = sent[classes == number]
        adapters[name] = AdapterTest(
            examples=len(own),
            wordings=held_out.wordings[number],
            right=float((own == number).mean()),
            wrong=float(((own != number) & (own != num_adapters)).mean()),
            abstained=float((own == num_adapters).mean()),
            threshold=final[number],
        )
    called = [*names, NONE]
    pairs = Counter(zip(classes.tolist(), sent.tolist(), strict=True))
    mine = classes < num_adapters
    wrong = (sent != classes) & (sent != num_adapters)
    return SelfTest(
        tested=count,
        right=float((sent == classes)[mine].mean()),
        wrong=float(wrong[mine].mean()),
        abstained=float((sent == num_adapters)[mine].mean()),
        none_sent=float(wrong[~mine].mean()) if not mine.all() else None,
        unknown_sent=float(unknown_sent.mean()),
        adapters=adapters,
        confusions=[
            (called[owner], called[to], number)
            for (owner, to), number in pairs.most_common()
            if owner != to and to != num_adapters
        ][:20],
    )
