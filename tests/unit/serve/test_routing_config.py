"""Routes files: what is taken, and with which words others are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from packhorse.serve.errors import Invalid
from packhorse.serve.routing.config import parse_routes, read_routes

GOOD = """
default: null
forbidden: refuse
learned: {enabled: true, wrong_route_rate: 0.02, none_examples: none.jsonl}
rules:
  - name: pills
    adapter: clinic
    priority: 10
    when: {any: [{keywords: [dose, 剂量]}, {regex: "(?i)side effects?"}, {not: {keywords: [x]}}]}
    over: conversation
  - {name: quotes, adapter: null, when: {all: [{regex: "^Repeat:"}]}}
"""


def test_a_whole_file() -> None:
    routes = parse_routes(GOOD)
    assert routes.adapters == ["clinic"]
    pills, quotes = routes.rules
    assert (pills.priority, pills.over, quotes.over) == (10, "conversation", "last")
    assert quotes.adapter is None
    assert [part.keywords for part in pills.when.parts[:1]] == [["dose", "剂量"]]


def test_an_empty_file_is_the_defaults() -> None:
    assert parse_routes("").learned.enabled
    assert parse_routes("{}") == parse_routes("")


def rule(when: str, more: str = "") -> str:
    return f"rules: [{{name: pills, adapter: clinic, when: {when}{more}}}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", r"line \d: "),
        ("- a", "the file: must be a mapping"),
        ("defualt: x", "defualt: there is no such field here"),
        ("learned: {wrong_route_rate: 1.5}", "learned.wrong_route_rate: '1.5': .* 0.2"),
        ("learned: {enabled: 3}", "learned.enabled: "),
        ("forbidden: maybe", "forbidden: 'maybe': .*'base' or 'refuse'"),
        ("rules: [{adapter: x, when: {keywords: [a]}}]", "rule number 1: name: is missing"),
        ("rules: [{name: p, when: {keywords: [a]}}]", "rule 'p': adapter: is missing"),
        ("rules: [3]", "rule number 1: must be a mapping"),
        (rule("{}"), "rule 'pills': when: must have exactly one of keywords, regex"),
        (rule("{keywords: [a], regex: b}"), "rule 'pills': when: must have exactly one of"),
        (rule("{keywords: []}"), "rule 'pills': when.keywords: "),
        (rule("{keywords: [' ']}"), r"rule 'pills': when.keywords\[1\]: "),
        (rule("{any: [{keywords: [a]}, {regexp: a}]}"), r"when.any\[2\].regexp: there is no such"),
        (rule(f"{{regex: '{'a' * 501}'}}"), "when.regex: .* 500"),
        (rule("{keywords: [a]}", ", over: all"), "over: 'all': .*'last' or 'conversation'"),
        (rule("{keywords: [a]}", ", priority: high"), "priority: 'high'"),
        (rule("{not: " * 9 + "{keywords: [a]}" + "}" * 9), "nested 10 deep; at most 200 and 8"),
        (
            "rules: [&r {name: a, adapter: null, when: {keywords: [a]}}, *r]",
            "two rules are called 'a'",
        ),
        ("learned: &l {accept: *l}", "line 1|accept"),
        ("a: " + "[" * 5000, r"not valid YAML|line \d: "),
    ],
)
def test_a_fault_says_where_and_what(text: str, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_routes(text, where="routes.yaml")
    assert caught.value.message.startswith("routes.yaml: ")
    assert re.search(message, caught.value.message), caught.value.message


def test_conditions_that_hold_themselves_are_refused() -> None:
    with pytest.raises(Invalid):
        parse_routes("rules: [{name: a, adapter: null, when: &w {not: *w}}]")


def test_files_are_read_and_none_examples_are_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text(GOOD, encoding="utf-8")
    assert read_routes(path).learned.none_examples == str(tmp_path / "none.jsonl")
    with pytest.raises(Invalid, match="cannot be read"):
        read_routes(tmp_path / "absent.yaml")
    path.write_bytes(b"\xff")
    with pytest.raises(Invalid, match="cannot be read"):
        read_routes(path)
