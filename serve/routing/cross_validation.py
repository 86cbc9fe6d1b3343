"""What training may be tested with: held-out scores, the thresholds from them, and the self-test.

Prompts of like wording stay in one of a few folds: otherwise "the dose of X" would be tested by a
model that has seen "the dose of Y", and every threshold would be too low. Besides, each class is
left out whole once, and its prompts scored by a model that has never heard of it: they stand for
the topics that no example speaks of. Arrays only; called by `fitting`, in the training process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray
from packhorse.serve.routing.text import wording

FOLDS = 5
# With more examples than this time is short: a sample, and fewer models, each of more of it.
SMALL = 2000
SAMPLE, SAMPLE_FOLDS = 4000, 3
# Prompts whose sets of words have at least this in common (Jaccard) are worded alike.
LIKE_WORDING = 0.5
# What thresholds may cost for the sake of unknown topics: this share of the right routes.
UNKNOWN_COST = 0.02

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
NONE = "none"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Scores (examples x classes) of models that had not seen the example, nor one worded alike.

    `classes` and `folds` are one number per example; the class after the last adapter is none.
    `wordings` is how many groups of like wording each class has; `unknown` are scores of models
    that had not seen the example's class at all.
    """

    classes: Integers
    folds: Integers
    wordings: list[int]
    scores: Floats
    unknown: Floats | None


class AdapterTest(msgspec.Struct, frozen=True):
    """How an adapter's own examples fared, held out, as shares of them. `wordings`: how many truly
    different wordings they have.
    """

    examples: int
    wordings: int
    right: float
    wrong: float
    abstained: float
    threshold: float


class SelfTest(msgspec.Struct, frozen=True):
    """Shares over all held-out examples of adapters; `none_sent` of those of none, `unknown_sent`
    of prompts whose class the model had never seen. `confusions`: whose, sent where, how often.
    """

    tested: int
    right: float
    wrong: float
    abstained: float
    none_sent: float | None
    unknown_sent: float
    adapters: dict[str, AdapterTest]
    confusions: list[tuple[str, str, int]]


def like_wordings(texts: Sequence[str]) -> Integers:
    """A group number per text. Each text joins the first group whose first text it is most like, so
    that groups cannot grow into each other link by link.
    """
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    sets = [wording(text) for text in texts]
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


def folds_of(groups: Integers, num_folds: int) -> Integers:
    """A fold per example: groups whole, the largest first, each into the emptiest fold. Where all
    are of one group there is nothing to keep apart, and examples are dealt out one by one.
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
    """The best adapter per row and its margin, as Table.judge has them."""
    best = scores[:, :num_adapters].argmax(1)
    rows = np.arange(len(scores))
    top = scores[rows, best]
    rest = scores.copy()
    rest[rows, best] = -np.inf
    return best, np.minimum(top, top - rest.max(1))


def letting_through(margins: Floats, allowed: float) -> float:
    """The smallest threshold, not below 0, that at most `allowed` of the margins are above."""
    ordered = np.sort(margins)[::-1]
    return max(0.0, float(ordered[int(allowed)])) if len(ordered) > int(allowed) else 0.0


def split(texts: Sequence[str], classes: Integers) -> tuple[Integers, Integers, list[int]]:
    """Which examples to hold out in turn, evenly over the classes; the fold of each; and how many
    groups of like wording each class has.
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
        groups = like_wordings([texts[at] for at in own])
        folds.append(folds_of(groups, num_folds))
        wordings.append(int(groups.max()) + 1)
    return np.concatenate(chosen), np.concatenate(folds), wordings


def thresholds(
    held_out: HeldOut, num_adapters: int, rate: float, among: NDArray[np.bool_] | None = None
) -> list[float]:
    """One per adapter, so that wrong routes to it are at most `rate` of its own examples; of
    unknown topics, all adapters together may get `rate`. `among` says which examples count.
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
        lowest = letting_through(margins[sent & ~own], rate * own.sum())
        for_unknown = letting_through(
            unknown[unknown_best == adapter], rate * len(unknown) / num_adapters
        )
        right = margins[sent & own]
        dear = float(np.quantile(right, UNKNOWN_COST)) if len(right) else 0.0
        found.append(max(lowest, min(for_unknown, dear)))
    return found


def self_test(
    held_out: HeldOut, names: Sequence[str], final: Sequence[float], rate: float
) -> SelfTest:
    """What becomes of held-out examples, each with thresholds that its own fold had no part in.
    `final` are the thresholds that will be served, for the report.
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
