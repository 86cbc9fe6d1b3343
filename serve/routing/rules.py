"""The rules of the routes file, compiled: keywords, regular expressions, any/all/not, by priority.

The first rule that matches decides. Rules must not block the event loop, so every text is bounded
(`text.MAX_CHARACTERS`), each search has the time limit SEARCH_S and all searches of one decision
together DECISION_S. A rule whose search times out does not match, not even under `not`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import regex

from packhorse.serve.errors import Invalid
from packhorse.serve.routing.config import Condition, Routes, Rule
from packhorse.serve.routing.text import (
    MAX_CHARACTERS,
    UNSPACED,
    casefolded,
    conversation_text,
    last_user_text,
    normalised,
)

# Wall time, as the regex library measures it; long enough for harmless searches on a busy machine.
SEARCH_S = 0.02
DECISION_S = 0.05

Outcome = Literal["matched", "no match", "gave up", "not loaded"]
T = TypeVar("T")

_HAS_UNSPACED = regex.compile(rf"[{UNSPACED}]")
_WORD = rf"[\w--[{UNSPACED}]]"
_NOT_LITERAL = re.compile(r"\\.|[\^$.*+?{}()|\[\]]", re.DOTALL)


class GaveUp(Exception):
    """A search has timed out."""


class Texts:
    """The texts of one conversation, each made at its first use, and the time left for searches."""

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self._messages = messages
        self._made: dict[str, str] = {}
        self._left_s = DECISION_S

    def raw(self, over: str) -> str:
        take = last_user_text if over == "last" else conversation_text
        return self._once(over, lambda: take(self._messages))

    def plain(self, over: str) -> str:
        return self._once(over + " plain", lambda: normalised(self.raw(over)))

    def casefolded(self, over: str) -> str:
        return self._once(over + " casefolded", lambda: casefolded(self.raw(over)))

    def _once(self, key: str, make: Callable[[], str]) -> str:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def search(self, pattern: regex.Pattern[str], text: str) -> bool:
        """Raises GaveUp."""
        if self._left_s <= 0:
            raise GaveUp
        started_s = time.perf_counter()
        try:
            return pattern.search(text, timeout=min(SEARCH_S, self._left_s)) is not None
        except TimeoutError:
            raise GaveUp from None
        finally:
            self._left_s -= time.perf_counter() - started_s


Check = Callable[[Texts, str], bool]


@dataclass(frozen=True, slots=True)
class Tried:
    """A rule and its outcome."""

    rule: Rule
    outcome: Outcome


class Rules:
    """All rules of a file, ready to be tried."""

    def __init__(self, routes: Routes) -> None:
        """Raises Invalid for a regular expression that is invalid or can take too long."""
        ordered = sorted(routes.rules, key=lambda rule: -rule.priority)
        self._rules = [(rule, _compiled(rule.when, rule.name, "when")) for rule in ordered]

    def first(
        self, texts: Texts, is_loaded: Callable[[str], bool]
    ) -> tuple[Rule | None, list[Tried]]:
        """The first rule that matches, and every rule tried, in order. Rules for an adapter that is
        not available are skipped.
        """
        tried: list[Tried] = []
        for rule, check in self._rules:
            if rule.adapter is not None and not is_loaded(rule.adapter):
                tried.append(Tried(rule, "not loaded"))
                continue
            try:
                matched = check(texts, rule.over)
            except GaveUp:
                tried.append(Tried(rule, "gave up"))
                continue
            tried.append(Tried(rule, "matched" if matched else "no match"))
            if matched:
                return rule, tried
        return None, tried


def _compiled(condition: Condition, rule: str, place: str) -> Check:
    if condition.keywords is not None:
        return _keywords(condition.keywords)
    if condition.regex is not None:
        pattern = _expression(condition.regex, rule, f"{place}.regex")
        return lambda texts, over: texts.search(pattern, texts.plain(over))
    if condition.not_ is not None:
        inner = _compiled(condition.not_, rule, f"{place}.not")
        return lambda texts, over: not inner(texts, over)
    kind = "any" if condition.any_of is not None else "all"
    checks = [
        _compiled(part, rule, f"{place}.{kind}[{number}]")
        for number, part in enumerate(condition.parts, start=1)
    ]
    if kind == "any":
        return lambda texts, over: any(check(texts, over) for check in checks)
    return lambda texts, over: all(check(texts, over) for check in checks)


def _keywords(keywords: Sequence[str]) -> Check:
    """A check for keywords: as whole words in scripts with spaces, as substrings where a keyword
    has a character of a script without spaces, in which nothing marks the end of a word.
    """
    forms = [" ".join(casefolded(keyword).split()) for keyword in keywords]
    inside = [form for form in forms if _HAS_UNSPACED.search(form)]
    words = [form for form in forms if not _HAS_UNSPACED.search(form)]
    first_words = [form.split()[0] for form in words]
    spaced = [r"\s+".join(map(re.escape, form.split())) for form in words]
    pattern = None
    if spaced:
        # A word may be next to Chinese characters: "Wexadil的用途".
        pattern = regex.compile(rf"(?V1)(?<!{_WORD})(?:{'|'.join(spaced)})(?!{_WORD})")

    def check(texts: Texts, over: str) -> bool:
        text = texts.casefolded(over)
        if any(form in text for form in inside):
            return True
        # Most texts contain no keyword; this test takes a tenth of the search's time.
        if pattern is None or not any(word in text for word in first_words):
            return False
        return texts.search(pattern, text)

    return check


def _expression(source: str, rule: str, field: str) -> regex.Pattern[str]:
    where = f"rule {rule!r}: {field}: {source!r}"
    try:
        pattern = regex.compile(source)
    except (regex.error, OverflowError, RecursionError) as error:
        raise Invalid(f"{where} is not a regular expression: {error}.") from None
    # Texts that make it backtrack: one letter repeated, either of the expression or of a common
    # class, with an end that does not match. The ends with the expression's literals are needed
    # because the search stops at once in a text that lacks a required literal.
    letters = dict.fromkeys([*"a0 A_.中", *(c for c in source if c.isalnum() or c.isspace())])
    literals = _NOT_LITERAL.sub("", source)
    ends = ("", "!", "\n", literals + "!", f" {literals}", f" {literals}!")
    for letter in list(letters)[:20]:
        for end in ends:
            if _is_slow(pattern, letter * (MAX_CHARACTERS - len(end)) + end):
                raise Invalid(
                    f"{where} takes longer than {SEARCH_S * 1000:.0f} ms on {MAX_CHARACTERS} "
                    f"characters ({letter!r} repeated); do not nest repetitions, like (a+)+, nor "
                    "put several .* into one expression, and begin it with \\b or ^ if it begins "
                    "with a repetition, like \\w+@."
                )
    return pattern


def _is_slow(pattern: regex.Pattern[str], text: str) -> bool:
    for _ in range(3):  # a busy machine may cause one or two time-outs
        try:
            pattern.search(text, timeout=SEARCH_S)
        except TimeoutError:
            continue
        return False
    return True
