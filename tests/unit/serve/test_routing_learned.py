"""The table against scikit-learn, and how thresholds come about."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from packhorse.serve.routing.cross_validation import (
    FOLDS,
    HeldOutScores,
    assign_folds,
    group_by_wording,
    self_test,
    split,
    threshold_for,
    thresholds,
)
from packhorse.serve.routing.learned import Table
from packhorse.serve.routing.text import features
from packhorse.serve.routing.train import FIT, Job, Trained, Vectorizer, fit, fit_classifier
from tests.unit.serve.routing_data import EVERYDAY, TOPICS, job, prompts

# The table keeps float32: 7 digits, of sums of a few hundred products of about 1.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def trained() -> Trained:
    return fit(job())


@pytest.fixture(scope="module")
def table(trained: Trained) -> Table:
    return Table(trained.table)


def flat(data: Job) -> tuple[list[str], list[int]]:
    groups = [*data.adapters.values(), *([data.none] if data.none else [])]
    return (
        [text for group in groups for text in group],
        [number for number, group in enumerate(groups) for _ in group],
    )


def test_scores_are_those_of_a_stock_pipeline_of_scikit_learn() -> None:
    data = job()
    # Twice, so that no feature is in one text only: those the two treat differently, on purpose.
    data = Job({n: t * 2 for n, t in data.adapters.items()}, data.none * 2, 0.01)
    texts, classes = flat(data)
    stock = make_pipeline(TfidfVectorizer(analyzer=features), LinearSVC(**FIT)).fit(texts, classes)
    table = Table(fit(data).table)
    ours = np.array([table.score(text) for text in texts])
    # The order of features, and so of sums, differs in the solver, which stops early.
    np.testing.assert_allclose(ours, stock.decision_function(texts), atol=1e-4)


@pytest.mark.parametrize("of_two", [False, True])
def test_scores_are_the_classifiers_also_for_text_never_seen(of_two: bool) -> None:
    data = job()
    if of_two:
        data = Job({"cars": data.adapters["cars"]}, data.none, 0.01)
    texts, classes = flat(data)
    sets = [features(text) for text in texts]
    vectorizer = Vectorizer(sets)
    classifier = fit_classifier(vectorizer.matrix(sets), np.array(classes))
    unseen = [*prompts(TOPICS["cars"], 20, 9), "zzqx 完全不同", "", "brake!", "what " * 900]
    expected = classifier.decision_function(vectorizer.matrix([features(t) for t in unseen]))
    table = Table(fit(data).table)
    ours = np.array([table.score(text) for text in unseen])
    if of_two:
        expected = np.stack([-expected, expected], axis=1)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def test_a_table_survives_the_wire(trained: Trained) -> None:
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(trained), type=Trained)
    assert again == trained
    assert Table(again.table).judge("the brake") == Table(trained.table).judge("the brake")


def test_new_prompts_go_where_they_belong(table: Table) -> None:
    for name, words in TOPICS.items():
        verdicts = [table.judge(prompt) for prompt in prompts(words, 30, 77)]
        assert sum(verdict.adapter == name for verdict in verdicts) >= 28
    assert all(table.judge(prompt).adapter is None for prompt in prompts(EVERYDAY, 30, 77))


@pytest.mark.parametrize("text", ["", "   ", "完全不同的东西", "qqq zzz xxx", "!!!", "\x00"])
def test_it_abstains_from_what_it_does_not_know(table: Table, text: str) -> None:
    verdict = table.judge(text)
    assert verdict.adapter is None
    assert verdict.margin <= verdict.threshold


def test_unknown_words_weaken_a_route(table: Table) -> None:
    known = table.judge("brake and clutch").margin
    assert table.judge("brake and clutch zwolka prynt hexamil odrane vistok").margin < known


def test_a_verdict_explains_itself(table: Table) -> None:
    verdict = table.judge("is brake better than clutch")
    assert (verdict.adapter, verdict.best) == ("cars", "cars")
    assert verdict.scores[0][0] == "cars"
    assert verdict.margin <= verdict.scores[0][1]


def test_without_none_examples_it_still_abstains() -> None:
    table = Table(fit(Job(job().adapters, [], 0.01)).table)
    assert table.judge("is brake better than clutch").adapter == "cars"
    assert table.judge("qqq zzz").adapter is None


def test_training_again_gives_the_same_table(trained: Trained) -> None:
    assert fit(job()) == trained


def test_like_wordings_are_one_group_and_stay_in_one_fold() -> None:
    names = ["Korelan", "Drixotan", "Wexadil"]
    texts = [f"Tell me the usual dose of {name}." for name in names]
    texts += [f"告诉我{name}的用途。" for name in names] + ["Something else entirely"]
    groups = group_by_wording(texts)
    assert groups.tolist() == [0, 0, 0, 1, 1, 1, 2]
    folds = assign_folds(groups, 3)
    assert all(len(set(folds[groups == group])) == 1 for group in range(3))
    assert set(assign_folds(np.zeros(10, np.int64), FOLDS)) == set(range(FOLDS))


def test_of_many_examples_a_sample_is_held_out() -> None:
    texts = [f"word{number} and {number % 7}" for number in range(5000)]
    classes = np.repeat([0, 1], [4990, 10])
    chosen, folds, wordings = split(texts, classes)
    assert np.bincount(classes[chosen]).tolist() == [2000, 10]
    assert set(folds) == {0, 1, 2}
    assert len(wordings) == 2


def test_a_threshold_lets_through_no_more_than_allowed() -> None:
    margins = np.array([0.5, -1.0, 0.3, 0.1])
    assert threshold_for(margins, 0) == 0.5
    assert threshold_for(margins, 1.9) == 0.3
    assert threshold_for(margins, 3) == 0.0
    assert threshold_for(margins, 9) == 0.0


def test_thresholds_count_wrong_routes_to_each_adapter() -> None:
    rng = np.random.default_rng(3)
    classes = np.repeat([0, 1, 2], 200)
    scores = rng.normal(-1, 0.7, (600, 3))
    scores[np.arange(600), classes] += 2.5
    held_out = HeldOutScores(classes, np.arange(600) % FOLDS, [9, 9, 9], scores, None)
    for rate in (0.0, 0.01, 0.05):
        limits = thresholds(held_out, 2, rate)
        for adapter in range(2):
            rivals = np.delete(scores, adapter, axis=1).max(1)
            margins = np.minimum(scores[:, adapter], scores[:, adapter] - rivals)
            wrong = ((margins > limits[adapter]) & (classes != adapter)).sum()
            assert wrong <= rate * 200
    test = self_test(held_out, ["a", "b"], limits, 0.05)
    assert 0.5 < test.right < 1
    assert test.right + test.wrong + test.abstained == pytest.approx(1)
    assert test.none_sent is not None
    assert {pair[0] for pair in test.confusions} <= {"a", "b", "none"}


def test_a_decision_is_cheap(table: Table) -> None:
    text = ("is brake better than clutch or should one ask the neighbour " * 5)[:300]
    table.judge(text)
    started_s = time.process_time()
    for _ in range(50):
        table.judge(text)
    # The goal is 0.5 ms with 50 adapters; bench/routing.py measures that.
    assert (time.process_time() - started_s) / 50 < 0.5e-3
