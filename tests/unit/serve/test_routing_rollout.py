"""Rollout: what is built, what is refused, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from packhorse.serve.errors import Conflict, DeadlineExceeded, Invalid
from packhorse.serve.routing.config import Routes, parse_routes
from packhorse.serve.routing.cross_validation import AdapterTest, SelfTest
from packhorse.serve.routing.examples import duplicates, read_examples
from packhorse.serve.routing.rollout import Rollout, RoutesVersion, build, shortcomings
from packhorse.serve.routing.train import Job, Trained, fit
from tests.unit.serve.routing_data import job

DATA = job()


async def here(given: Job) -> Trained:
    """Training in this process: the child has its own tests."""
    return fit(given)


def routes(**fields: Any) -> Routes:
    return parse_routes(json.dumps(fields))


async def built(
    number: int = 1,
    *,
    examples: dict[str, list[str]] | None = None,
    none: list[str] | None = None,
    **fields: Any,
) -> RoutesVersion:
    return await build(
        routes(**fields),
        DATA.adapters if examples is None else examples,
        DATA.none if none is None else none,
        number=number,
        train=here,
        clock=lambda: 1234.5,
    )


def adapter_of(version: RoutesVersion, text: str) -> str | None:
    return version.cascade.decide(
        [{"role": "user", "content": text}],
        may_use=lambda _: True,
        available=DATA.adapters,
    ).adapter


async def test_a_version_is_tested_and_decides() -> None:
    version = await built()
    assert (version.number, version.created_s) == (1, 1234.5)
    test = version.report.self_test
    assert test is not None
    assert test.right > 0.9
    assert test.wrong <= 0.02
    assert set(test.adapters) == set(DATA.adapters)
    assert adapter_of(version, "is brake better than clutch") == "cars"
    msgspec.json.encode(version.report)


async def test_an_adapter_without_examples_has_rules_and_says_so() -> None:
    rule = {"name": "sea", "adapter": "boats", "when": {"keywords": ["sail"]}}
    examples = {**DATA.adapters, "boats": []}
    version = await built(examples=examples, rules=[rule])
    assert any("'boats' has no examples" in note for note in version.report.notes)
    decision = version.cascade.decide(
        [{"role": "user", "content": "sail away"}],
        may_use=lambda _: True,
        available=examples,
    )
    assert decision.adapter == "boats"


@pytest.mark.parametrize(
    ("examples", "none", "fields", "note"),
    [
        ({}, [], {}, "no adapter has examples"),
        ({"cars": DATA.adapters["cars"]}, [], {}, "needs two adapters"),
        (DATA.adapters, DATA.none, {"learned": {"enabled": False}}, "switched off"),
    ],
)
async def test_without_a_table_the_report_says_why(
    examples: dict[str, list[str]], none: list[str], fields: dict[str, Any], note: str
) -> None:
    version = await built(examples=examples, none=none, **fields)
    assert version.report.self_test is None
    assert any(note in each for each in version.report.notes)
    assert adapter_of(version, "is brake better than clutch") is None
    assert shortcomings(version, None) == []


@pytest.mark.parametrize(
    ("examples", "none", "fields", "message"),
    [
        ({"cars": ["one"] * 9}, DATA.none, {}, "'cars' has 9 examples, below the minimum of 10"),
        (DATA.adapters, ["one"], {}, "'none_examples' has 1 examples"),
        (DATA.adapters, DATA.none, {"default": "boats"}, "'boats', which does not exist; .* cars"),
        ({"cars": ["x"] * 50_001}, DATA.none, {}, "above the limit of 50000"),
        (
            DATA.adapters,
            DATA.none,
            {"rules": [{"name": "r", "adapter": None, "when": {"regex": "(a+)+$"}}]},
            "takes longer",
        ),
    ],
)
async def test_what_cannot_work_is_refused_before_training(
    examples: dict[str, list[str]], none: list[str], fields: dict[str, Any], message: str
) -> None:
    async def never(_: Job) -> Trained:
        raise AssertionError

    with pytest.raises(Invalid, match=message):
        await build(routes(**fields), examples, none, number=1, train=never)


async def test_phrases_that_two_adapters_claim_are_found_and_cost_the_version() -> None:
    first = Rollout(await built())
    twin = [prompt.upper() + "  " for prompt in DATA.adapters["cars"]]
    version = await built(2, examples={**DATA.adapters, "cars-v2": twin})
    report = version.report
    assert report.num_duplicates == 60
    assert len(report.duplicates) == 20
    assert report.duplicates[0][1] == ("cars", "cars-v2")
    considered = first.consider(version)
    assert not considered.accepted
    assert any("'cars' gets" in reason for reason in considered.reasons)
    assert considered.report is report
    assert first.current.number == 1


def with_test(version: RoutesVersion, number: int, **shares: Any) -> RoutesVersion:
    """The same with another number and self-test."""
    test = version.report.self_test
    assert test is not None
    changed = msgspec.structs.replace(test, **shares)
    return replace(version, number=number, report=replace(version.report, self_test=changed))


async def test_limits_and_tolerance() -> None:
    good = await built(learned={"accept": {"min_right": 0.8, "max_wrong": 0.02}})
    assert shortcomings(good, None) == []
    for shares, words in (
        ({"right": 0.79}, "below min_right=80.0%"),
        ({"wrong": 0.03}, "of adapters' held-out examples go to a wrong adapter"),
        ({"none_sent": 0.03}, "of none's go to a wrong adapter"),
    ):
        (reason,) = shortcomings(with_test(good, 2, **shares), None)
        assert words in reason
    test = good.report.self_test
    assert isinstance(test, SelfTest)
    cars = test.adapters["cars"]
    for lost, count in ((0.04, 0), (0.06, 1)):
        worse = AdapterTest(*[*msgspec.structs.astuple(cars)[:2], cars.right - lost, 0, 0, 0])
        new = with_test(good, 2, adapters={**test.adapters, "cars": worse})
        assert len(shortcomings(new, good)) == count
    gone = {name: each for name, each in test.adapters.items() if name != "cars"}
    assert shortcomings(with_test(good, 2, adapters=gone), good) == []


async def test_a_swap_a_refusal_and_the_way_back() -> None:
    first = await built()
    rollout = Rollout(first)
    with pytest.raises(Conflict):
        rollout.roll_back()
    for _ in range(7):
        assert rollout.consider(with_test(first, rollout.next_number())).accepted
    assert rollout.current.number == 8
    assert [each.number for each in rollout.history] == [7, 6, 5, 4, 3]
    refused = rollout.consider(with_test(first, rollout.next_number(), right=0.1))
    assert not refused.accepted
    assert rollout.current.number == 8
    assert rollout.roll_back().number == 7
    assert rollout.current.number == 7
    assert rollout.next_number() == 10  # never one that was used


async def test_an_older_build_that_ends_later_does_not_win() -> None:
    first = await built()
    rollout = Rollout(first)
    early, late = rollout.next_number(), rollout.next_number()
    assert rollout.consider(with_test(first, late)).accepted
    considered = rollout.consider(with_test(first, early))
    assert not considered.accepted
    assert "younger" in considered.reasons[0]


async def test_a_first_version_that_falls_short_keeps_its_rules_only() -> None:
    rule = {"name": "sea", "adapter": "cars", "when": {"keywords": ["sail"]}}
    rollout = Rollout(with_test(await built(rules=[rule]), 1, wrong=0.5))
    assert adapter_of(rollout.current, "sail") == "cars"
    assert adapter_of(rollout.current, "is brake better than clutch") is None
    assert rollout.current.report.notes[-1] == "The learned stage is off."


async def test_a_training_that_fails_changes_nothing() -> None:
    rollout = Rollout(await built())

    async def fails(_: Job) -> Trained:
        raise DeadlineExceeded("too long")

    with pytest.raises(DeadlineExceeded):
        await build(routes(), DATA.adapters, DATA.none, number=2, train=fails)
    assert rollout.current.number == 1


def test_examples_are_read_with_errors_by_line(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "剂量", "note": 1}\n', encoding="utf-8")
    assert read_examples(path) == ["a", "剂量"]
    with pytest.raises(Invalid, match="cannot be read"):
        read_examples(tmp_path / "absent.jsonl")
    for line in ("{", '{"prompt": 3}', '["a"]', '{"prompt": " "}', '{"text": "a"}', "\xff"):
        path.write_bytes(b'{"prompt": "a"}\n' + line.encode("latin-1"))
        with pytest.raises(Invalid, match=r"examples\.jsonl: line 2: "):
            read_examples(path)


def test_duplicates_ignore_case_width_and_spaces_but_not_repeats_within_one() -> None:
    found = duplicates({"a": ["The  Dose", "x", "x"], "b": ["ｔｈｅ dose "], "c": ["y"]})
    assert found == [("The  Dose", ["a", "b"])]
