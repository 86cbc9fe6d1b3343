"""The cascade: which stage decides, what access does to it, and what an explanation may say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from packhorse.serve.errors import Forbidden
from packhorse.serve.routing.base import Decision
from packhorse.serve.routing.cascade import Cascade
from packhorse.serve.routing.config import parse_routes
from packhorse.serve.routing.learned import Table
from packhorse.serve.routing.train import fit
from tests.unit.serve.routing_data import TOPICS, job

ALL = frozenset(TOPICS)
RULES = [
    {"name": "quoted", "adapter": None, "priority": 9, "when": {"regex": "^Repeat:"}},
    {"name": "rude", "adapter": "garden", "priority": 5, "when": {"keywords": ["rose"]}},
    {"name": "later", "adapter": "kitchen", "when": {"keywords": ["rose", "oven"]}},
]
CAR = "is brake better than clutch"


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(fit(job()).table)


def decide(
    table: Table | None,
    text: Any,
    *,
    may: frozenset[str] = ALL,
    available: frozenset[str] = ALL,
    **file: Any,
) -> Decision:
    cascade = Cascade(parse_routes(json.dumps({"rules": RULES, **file})), table)
    messages = [{"role": "user", "content": text}] if text is not None else []
    return cascade.decide(messages, may_use=may.__contains__, available=available)


def test_rules_come_before_the_table(table: Table) -> None:
    decision = decide(table, "a rose, and the brake and clutch of the engine")
    assert (decision.adapter, decision.stage) == ("garden", "rules")
    assert "'rude'" in decision.reason
    assert [step.get("outcome") for step in decision.trace] == ["no match", "matched", "allowed"]


def test_a_rule_may_send_to_the_base_for_sure(table: Table) -> None:
    decision = decide(table, "Repeat: " + CAR)
    assert (decision.adapter, decision.stage) == (None, "rules")


def test_the_table_decides_where_no_rule_does(table: Table) -> None:
    decision = decide(table, CAR)
    assert (decision.adapter, decision.stage) == ("cars", "learned")
    assert decision.margin is not None
    assert decision.margin > table.thresholds["cars"]
    scores = [step for step in decision.trace if step["stage"] == "learned"]
    assert scores[0]["adapter"] == "cars"
    assert json.loads(json.dumps(decision.trace)) == list(decision.trace)


@pytest.mark.parametrize("text", ["what is the weather like", "", None, 7, [], "完全不同"])
def test_undecided_goes_to_the_default(table: Table, text: Any) -> None:
    decision = decide(table, text)
    assert (decision.adapter, decision.stage) == (None, "default")
    assert decide(table, text, default="cars").adapter == "cars"
    assert decide(None, text, default="cars").adapter == "cars"
    assert decide(table, text, default="cars", may=frozenset()).adapter is None
    assert decide(table, text, default="cars", available=frozenset()).adapter is None


def test_the_learned_stage_can_be_switched_off_or_look_at_everything(table: Table) -> None:
    assert decide(table, CAR, learned={"enabled": False}).stage == "default"
    routes = parse_routes(json.dumps({"learned": {"over": "conversation"}}))
    messages = [{"role": "user", "content": text} for text in (CAR, "and then?")]
    for given, expected in ((routes, "cars"), (parse_routes(""), None)):
        decision = Cascade(given, table).decide(messages, may_use=ALL.__contains__, available=ALL)
        assert decision.adapter == expected


@pytest.mark.parametrize(
    ("text", "hidden", "stage"), [("a rose", "garden", "rules"), (CAR, "cars", "learned")]
)
def test_a_forbidden_adapter_is_never_named(
    table: Table, text: str, hidden: str, stage: str
) -> None:
    decision = decide(table, text, may=ALL - {hidden})
    assert (decision.adapter, decision.stage, decision.margin) == (None, stage, None)
    assert "may not use" in decision.reason
    shown = decision.reason + json.dumps(decision.trace)
    assert hidden not in shown
    assert hidden != "garden" or "rude" not in shown
    with pytest.raises(Forbidden) as caught:
        decide(table, text, may=ALL - {hidden}, forbidden="refuse")
    assert hidden not in caught.value.message


def test_scores_and_rules_of_hidden_adapters_are_hidden_when_others_decide(table: Table) -> None:
    decision = decide(table, CAR, may=frozenset({"cars"}))
    assert decision.adapter == "cars"
    assert {step.get("adapter") for step in decision.trace} <= {"cars", None}
    assert "rude" not in json.dumps(decision.trace)
    undecided = decide(table, "a weather of oven", may=frozenset({"cars"}), rules=[])
    assert "kitchen" not in undecided.reason + json.dumps(undecided.trace)


def test_an_adapter_that_is_not_loaded_gets_nothing(table: Table) -> None:
    decision = decide(table, CAR, available=ALL - {"cars"})
    assert (decision.adapter, decision.stage) == (None, "default")
    assert "not loaded" in decision.reason
    passed_over = decide(table, "a rose", available=ALL - {"garden"})
    assert passed_over.adapter == "kitchen"


def test_a_huge_conversation_is_decided_too(table: Table) -> None:
    text = [{"type": "text", "text": "z" * 1_000_000}] * 50
    assert decide(table, text).adapter is None
