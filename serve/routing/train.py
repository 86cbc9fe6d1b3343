"""Training of the learned table: feature matrix, linear SVMs, thresholds, self-test.

Runs in the training process only: this is the one file that imports scikit-learn, and it holds the
GIL for seconds. Features and FIT were chosen by cross-validation on the demo's examples, never on
evaluation files (docs/routing.md).

Called by `train_process`, in the child; `cross_validation` splits the examples into folds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from packhorse.serve.routing.cross_validation import (
    HeldOutScores,
    SelfTest,
    self_test,
    split,
    thresholds,
)
from packhorse.serve.routing.learned import TableData
from packhorse.serve.routing.text import features

# tol is liblinear's default; scikit-learn's is a thousand times smaller and changes no route.
FIT: dict[str, Any] = {"C": 1.0, "tol": 0.1, "random_state": 0, "max_iter": 2000}
MAX_VOCABULARY = 1 << 17

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Job(msgspec.Struct, frozen=True):
    """The input of a training: examples of each adapter, and of none (may be empty).
    `wrong_route_rate` is a share, above 0 and below 1.
    """

    adapters: dict[str, list[str]]
    none: list[str]
    wrong_route_rate: float


class Trained(msgspec.Struct, frozen=True):
    table: TableData
    self_test: SelfTest


Train = Callable[[Job], Awaitable[Trained]]


class Vectorizer:
    """Feature sets to rows of length 1, weighted by inverse document frequency: ln((1 + n) /
    (1 + df)) + 1, scikit-learn's smooth idf. Features of a single example are left out.
    """

    def __init__(self, sets: Sequence[set[str]]) -> None:
        counts: Counter[str] = Counter()
        for found in sets:
            counts.update(found)
        often = [item for item in counts.items() if item[1] >= 2]
        often.sort(key=lambda item: (-item[1], item[0]))
        del often[MAX_VOCABULARY:]
        self.vocabulary = [name for name, _ in often]
        self._rows = {name: row for row, name in enumerate(self.vocabulary)}
        in_texts = np.array([count for _, count in often], np.float64)
        self.rarity: Floats = np.log((1 + len(sets)) / (1 + in_texts)) + 1
        self.unseen_rarity = float(np.log((1 + len(sets)) / 2) + 1)

    def matrix(self, sets: Sequence[set[str]]) -> Any:
        """A scipy CSR matrix, one row per set."""
        from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

        get = self._rows.get
        columns: list[NDArray[np.int32]] = []
        values: list[Floats] = []
        starts = [0]
        for found in sets:
            known = [row for feature in found if (row := get(feature)) is not None]
            at = np.sort(np.array(known, np.int32))
            weights = self.rarity[at]
            square = weights @ weights + (len(found) - len(at)) * self.unseen_rarity**2
            columns.append(at)
            values.append(weights / np.sqrt(square) if square else weights)
            starts.append(starts[-1] + len(at))
        parts = (np.concatenate(values), np.concatenate(columns), np.array(starts))
        return csr_matrix(parts, shape=(len(sets), len(self.vocabulary)))


def fit_classifier(matrix: Any, classes: Integers) -> Any:
    """scikit-learn's linear SVM, one class against the rest."""
    from sklearn.svm import LinearSVC  # type: ignore[import-untyped]

    return LinearSVC(**FIT).fit(matrix, classes)


def class_columns(classifier: Any, num_classes: int) -> tuple[Floats, Floats]:
    """Coefficients (features x classes) and intercepts. For two classes scikit-learn stores one
    column. A class that was left out of the training gets the score -inf.
    """
    weights, intercepts = classifier.coef_, classifier.intercept_
    if len(classifier.classes_) == 2:
        weights = np.concatenate([-weights, weights])
        intercepts = np.concatenate([-intercepts, intercepts])
    all_weights = np.zeros((weights.shape[1], num_classes))
    all_intercepts = np.full(num_classes, -np.inf)
    all_weights[:, classifier.classes_] = weights.T
    all_intercepts[classifier.classes_] = intercepts
    return all_weights, all_intercepts


def _scores(
    sets: Sequence[set[str]], classes: Integers, tested: Sequence[set[str]], k: int
) -> Floats:
    """Scores of `tested` (texts x k classes) by a model of `sets`."""
    vectorizer = Vectorizer(sets)
    weights, intercepts = class_columns(fit_classifier(vectorizer.matrix(sets), classes), k)
    scores: Floats = vectorizer.matrix(tested) @ weights + intercepts
    return scores


def cross_validate(
    sets: Sequence[set[str]], classes: Integers, texts: Sequence[str]
) -> HeldOutScores:
    """Scores by models that saw no similarly worded prompt, and by models that saw none of the
    prompt's class.
    """
    k = int(classes.max()) + 1
    chosen, folds, wordings = split(texts, classes)
    sets, classes = [sets[at] for at in chosen], classes[chosen]
    scores = np.zeros((len(sets), k))
    unknown = np.full((len(sets), k), -np.inf)
    # With two classes, leaving one out would leave nothing to learn.
    num_folds = int(folds.max()) + 1
    batches = min(k, num_folds) if k > 2 else 0
    for scored_by, away in [
        *((scores, folds == fold) for fold in range(num_folds)),
        *((unknown, classes % batches == batch) for batch in range(batches)),
    ]:
        seen = [found for found, held in zip(sets, away, strict=True) if not held]
        held = [found for found, held in zip(sets, away, strict=True) if held]
        scored_by[away] = _scores(seen, classes[~away], held, k)
    return HeldOutScores(classes, folds, wordings, scores, unknown if batches else None)


def fit_table(
    job: Job, held_out: HeldOutScores, sets: Sequence[set[str]], classes: Integers
) -> TableData:
    """The table trained on all examples, with thresholds from the held-out scores."""
    names = list(job.adapters)
    vectorizer = Vectorizer(sets)
    classifier = fit_classifier(vectorizer.matrix(sets), classes)
    weights, intercepts = class_columns(classifier, len(names) + bool(job.none))
    return TableData(
        adapters=names,
        has_none=bool(job.none),
        vocabulary=vectorizer.vocabulary,
        rarity=vectorizer.rarity.astype("<f4").tobytes(),
        unseen_rarity=vectorizer.unseen_rarity,
        coefficients=weights.astype("<f4").tobytes(),
        intercepts=intercepts.tolist(),
        thresholds=thresholds(held_out, len(names), job.wrong_route_rate),
    )


def fit(job: Job) -> Trained:
    """The whole training run. Needs at least two classes with two examples each."""
    groups = [*job.adapters.values(), *([job.none] if job.none else [])]
    texts = [text for group in groups for text in group]
    classes = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    sets = [features(text) for text in texts]
    held_out = cross_validate(sets, classes, texts)
    table = fit_table(job, held_out, sets, classes)
    names = list(job.adapters)
    return Trained(table, self_test(held_out, names, table.thresholds, job.wrong_route_rate))
