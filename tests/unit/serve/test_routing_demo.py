"""The goals of routing, on the demo's data: wordings of evaluation that no example has."""

from __future__ import annotations

import asyncio
import json

import pytest

from packhorse.serve.routing.config import parse_routes
from packhorse.serve.routing.examples import read_examples
from packhorse.serve.routing.rollout import Rollout, RoutesVersion, build
from tests.conftest import DEMO

NAMES = ("clinic", "ledger", "code")
QUOTING = "repeat"


def demo_examples() -> tuple[dict[str, list[str]], list[str]]:
    """Of the adapters and of none."""
    folder = DEMO / "adapters"
    by_name = {name: read_examples(folder / name / "examples.jsonl") for name in NAMES}
    return by_name, read_examples(DEMO / "base_examples.jsonl")


@pytest.fixture(scope="module")
def version() -> RoutesVersion:
    """Trained in a real child process."""
    return asyncio.run(build(parse_routes(""), *demo_examples(), number=1))


def sent(version: RoutesVersion, file: str, *, quoting: bool = False) -> list[str | None]:
    lines = (DEMO / "eval" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        version.cascade.decide(
            [*row.get("history", []), {"role": "user", "content": row["prompt"]}],
            may_use=lambda _: True,
            available=NAMES,
        ).adapter
        for row in rows
        if (row["domain"] == QUOTING) is quoting
    ]


def test_the_self_test_is_good_enough_to_be_used(version: RoutesVersion) -> None:
    assert Rollout(version).current is version
    test = version.report.self_test
    assert test is not None
    # Harder than the evaluation: a wording is away from the adapter's examples while quotes of it
    # stay among those of none.
    assert test.right >= 0.93
    assert test.wrong <= 0.01
    assert test.none_sent is not None
    assert test.none_sent <= 0.02, "3% would be refused"
    assert version.report.num_duplicates == 0


@pytest.mark.parametrize("name", NAMES)
def test_unseen_wordings_reach_their_adapter(version: RoutesVersion, name: str) -> None:
    found = sent(version, name)
    assert len(found) >= 200
    assert found.count(name) >= 0.97 * len(found)
    assert len(found) - found.count(name) - found.count(None) <= 0.01 * len(found)


@pytest.mark.parametrize("name", ["off_topic", "general"])
def test_what_is_nobodys_stays_with_the_base(version: RoutesVersion, name: str) -> None:
    found = sent(version, name)
    assert len(found) >= 300
    assert found.count(None) >= 0.97 * len(found)


def test_quoted_questions_stay_with_the_base(version: RoutesVersion) -> None:
    """A question or an answer of an adapter after "Say after me:": quoted in these words nowhere
    in the examples, which have other ways to quote, and other questions.
    """
    found = sent(version, "general", quoting=True)
    assert len(found) == 64
    assert found.count(None) >= 0.97 * len(found)
