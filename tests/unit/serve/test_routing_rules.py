"""Rules: keywords in scripts with and without spaces, expressions that hurt, order and trace."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from packhorse.serve.errors import Invalid
from packhorse.serve.routing import rules as rules_module
from packhorse.serve.routing.config import parse_routes
from packhorse.serve.routing.rules import Rules, Texts


def make(*rules: dict[str, Any]) -> Rules:
    named = [{"name": f"r{number}", "adapter": "a", **rule} for number, rule in enumerate(rules)]
    return Rules(parse_routes(json.dumps({"rules": named})))


def user(*texts: str) -> Texts:
    return Texts([{"role": "user", "content": text} for text in texts])


def matches(when: dict[str, Any], text: str, **more: Any) -> bool:
    return make({"when": when, **more}).first(user(text), lambda _: True)[0] is not None


@pytest.mark.parametrize(
    ("keyword", "text", "expected"),
    [
        ("dose", "Which DOSE of it?", True),
        ("dose", "Which doses?", False),
        ("dose", "overdose", False),
        ("dose", "dose_of", False),
        ("side effect", "a side\n  effect.", True),
        ("STRASSE", "in der Straße", True),
        ("ｄｏｓｅ", "dose", True),
        ("剂量", "Wexadil的剂量是多少", True),
        ("wexadil", "告诉我Wexadil的用途", True),
        ("剂量", "用途", False),
        ("くすり", "このくすりは", True),
        ("ยา", "กินยาวันละ", True),
        ("약", "이 약 은", True),
        ("c++", "is C++ hard?", True),
        ("हिन्दी", "मुझे हिन्दी आती है", True),
        ("हिन्द", "मुझे हिन्दी आती है", False),  # a vowel sign goes on with the word
    ],
)
def test_keywords(keyword: str, text: str, expected: bool) -> None:
    assert matches({"keywords": ["qqq", keyword]}, text) is expected


def test_expressions_see_normalised_text_and_case_matters() -> None:
    assert matches({"regex": r"side effects?$"}, "a ｓｉｄｅ effect")
    assert not matches({"regex": "side"}, "SIDE")
    assert matches({"regex": "(?i)side"}, "SIDE")


def test_any_all_not() -> None:
    a, b = {"keywords": ["a"]}, {"keywords": ["b"]}
    assert matches({"any": [a, b]}, "b")
    assert not matches({"any": [a, b]}, "c")
    assert matches({"all": [a, b]}, "b a")
    assert not matches({"all": [a, b]}, "b")
    assert matches({"all": [a, {"not": b}]}, "a")
    assert not matches({"all": [a, {"not": b}]}, "a b")


def test_over_conversation_sees_earlier_messages() -> None:
    for over, found in (("last", False), ("conversation", True)):
        rules = make({"when": {"keywords": ["dose"]}, "over": over})
        assert (rules.first(user("the dose?", "and?"), lambda _: True)[0] is not None) is found


def test_the_highest_priority_is_tried_first_then_the_files_order() -> None:
    when = {"keywords": ["a"]}
    rules = make(
        {"when": when},
        {"when": {"keywords": ["z"]}, "priority": 5},
        {"when": when, "priority": 1},
        {"when": when, "priority": 1},
    )
    rule, tried = rules.first(user("a"), lambda _: True)
    assert rule is not None
    assert rule.name == "r2"
    assert [(each.rule.name, each.outcome) for each in tried] == [
        ("r1", "no match"),
        ("r2", "matched"),
    ]


def test_a_rule_to_an_adapter_that_is_not_loaded_is_passed_over() -> None:
    when = {"keywords": ["a"]}
    rules = make({"when": when, "adapter": "gone"}, {"when": when, "adapter": None})
    rule, tried = rules.first(user("a"), lambda name: name != "gone")
    assert rule is not None
    assert rule.adapter is None
    assert [each.outcome for each in tried] == ["not loaded", "matched"]


@pytest.mark.parametrize(
    "source",
    ["(a+)+$", "(x+x+)+y", "^(.*a){20}$", "(a|a)*$", "([a-z]+)*!!", r"(\w+\s?)+:$", "(中+)+。"],
)
def test_expressions_that_can_take_forever_are_refused(source: str) -> None:
    with pytest.raises(Invalid, match="takes longer than 20 ms"):
        make({"when": {"regex": source}})


@pytest.mark.parametrize("source", ["(", "a{99999999999}", "[z-a]", "(?P<n>a)(?P=m)"])
def test_what_is_no_expression_is_refused_with_its_place(source: str) -> None:
    with pytest.raises(Invalid, match=r"rule 'r0': when\.any\[1\]\.regex: .*not a regular expr"):
        make({"when": {"any": [{"regex": source}]}})


def test_an_expression_that_passed_and_then_hurts_is_ended_and_does_not_match() -> None:
    # It repeats two letters together, which no probe does.
    hostile = {"regex": "((?:bc)+)+\x01"}
    rules = make(
        {"when": {"not": hostile}},
        {"when": hostile},
        {"when": hostile},
        {"when": hostile},
        {"when": {"keywords": ["never"]}},
    )
    started_s = time.process_time()
    rule, tried = rules.first(user("bc" * 50_000 + "\x01"), lambda _: True)
    assert time.process_time() - started_s < 0.5
    assert rule is None
    assert [each.outcome for each in tried[:4]] == ["gave up"] * 4


def test_searches_of_one_decision_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_module, "DECISION_S", 0.0)
    rules = make({"when": {"regex": "a"}}, {"when": {"keywords": ["中"]}})
    rule, tried = rules.first(user("a 中"), lambda _: True)
    assert rule is not None
    assert [each.outcome for each in tried] == ["gave up", "matched"]
