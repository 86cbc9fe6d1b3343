"""Text for routing: bounds, odd messages, and that both ways to cut ASCII agree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.serve.routing import text
from packhorse.serve.routing.text import (
    MAX_CHARACTERS,
    bounded,
    casefolded,
    conversation_text,
    features,
    last_user_text,
    normalised,
    text_of,
    word_set,
)


@given(st.text(st.characters(max_codepoint=127), max_size=80))
def test_ascii_is_cut_as_everything_else_is(prompt: str) -> None:
    # A letter of another script makes it take the general way; alone it is one feature, and more
    # only with what is before it, so a space keeps it apart.
    assert features(prompt + " 中") - {"中"} == features(prompt)


@given(st.text(max_size=40))
def test_any_text_is_cut_without_error(prompt: str) -> None:
    features(prompt)
    word_set(prompt)


def test_words_ngrams_and_runs_without_spaces() -> None:
    found = features("Dose 250, 剂量的")
    assert {"=dose", " do", "ose ", "=000", "=,", "剂", "剂量", "剂量的"} <= found
    assert not any("250" in feature for feature in found)
    assert features("ＤＯＳＥ") == features("dose")  # full width


def test_combining_marks_stay_in_their_words() -> None:
    assert "=हिन्दी" in features("हिन्दी भाषा")


@pytest.mark.parametrize("make", [normalised, casefolded, bounded])
def test_no_text_is_longer_than_the_bound(make: Any) -> None:
    for character in ("a", "\ufdfa", "ß", "İ"):  # U+FDFA becomes 18 characters
        assert len(make(character * 100_000)) <= MAX_CHARACTERS


def test_head_and_tail_of_a_long_text_are_kept() -> None:
    assert bounded("a" * 9000 + "b" * 9000).strip("ab") == "\n"
    assert bounded("short") == "short"


def test_parts_of_type_text_are_read_and_others_passed_over() -> None:
    parts: list[Any] = [
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "text", "text": None},
        "a string",
        {"type": "text", "text": "this?"},
    ]
    assert text_of({"role": "user", "content": parts}) == "What is\nthis?"


@pytest.mark.parametrize("content", [None, 7, {}, [], [None], [{"type": "text"}]])
def test_other_content_is_no_text(content: Any) -> None:
    assert text_of({"role": "user", "content": content}) == ""
    assert text_of({}) == ""


def test_the_last_user_message_counts() -> None:
    messages = [
        {"role": "user", "content": "first"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "answer"},
    ]
    assert last_user_text(messages) == "second"
    assert last_user_text([]) == ""
    assert last_user_text([{"role": "system", "content": "be kind"}]) == ""
    assert conversation_text(messages) == "first\nsecond"
    assert conversation_text([]) == ""


def test_huge_conversations_are_bounded_and_the_newest_is_kept() -> None:
    messages = [{"role": "user", "content": f"{number} " + "x" * 1000} for number in range(10_000)]
    whole = conversation_text(messages)
    assert len(whole) <= MAX_CHARACTERS
    assert "9999 x" in whole
    many_parts = [{"type": "text", "text": "y" * 5000}] * 10_000
    assert len(text_of({"content": many_parts})) <= MAX_CHARACTERS


def test_a_long_word_has_few_features() -> None:
    assert len(features("z" * 5000)) < 20
    assert len(features("".join(map(chr, range(0x4E00, 0x8E00))))) < 3 * text.LEARNED_CHARACTERS
