"""The time that all expressions of one decision share, on a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from packhorse.serve.routing import rules
from packhorse.serve.routing.rules import DECISION_S, SEARCH_S, GaveUp, Texts


class Slow:
    """An expression that takes all the time it is given."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.given_s: list[float] = []

    def search(self, text: str, *, timeout: float) -> Any:
        self.given_s.append(timeout)
        self.now_s += timeout
        raise TimeoutError


def test_many_slow_expressions_take_no_longer_than_a_decision_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow: Any = Slow()
    monkeypatch.setattr(rules, "time", SimpleNamespace(perf_counter=lambda: slow.now_s))
    texts = Texts([])
    for _ in range(20):
        with pytest.raises(GaveUp):
            texts.search(slow, "text")
    assert slow.given_s[0] == SEARCH_S
    assert max(slow.given_s) <= SEARCH_S
    assert sum(slow.given_s) == pytest.approx(DECISION_S)
