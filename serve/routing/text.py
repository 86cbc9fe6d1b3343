"""Text for routing: bounded, normalised, and turned into features.

Texts are bounded before any other step, because the cost of a decision grows with the length and
the event loop waits for it. Called by `rules`, `learned` and `train`; the last two must extract the
same features, or a table's coefficients would not fit.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import regex

# Characters of a conversation that routing reads.
MAX_CHARACTERS = 4000
# Characters that the learned stage reads; scoring costs about 1 us for each.
LEARNED_CHARACTERS = 1000

# Scripts without spaces between words: a "word" of these is any run of their characters.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u30fc\u3005"

_TOKEN = regex.compile(
    rf"(?V1)([{UNSPACED}]+)|(\p{{N}}+)|([\p{{L}}\p{{M}}--[{UNSPACED}]]+)"
    r"|([^\p{L}\p{M}\p{N}\p{C}\s_])"
)
# The same tokens for ASCII text, in a quarter of the time.
_ASCII_TOKEN = re.compile(r"[0-9]+|[a-z]+|[^\s0-9a-z_\x00-\x1f\x7f]")


def bounded(text: str, limit: int = MAX_CHARACTERS) -> str:
    """At most `limit` characters: of a long text head and tail, where a question mostly is."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return text[:half] + "\n" + text[len(text) - (limit - half - 1) :]


def normalised(text: str) -> str:
    """NFKC-normalised: full-width letters, ligatures and the like become plain ones. Bounded."""
    return bounded(unicodedata.normalize("NFKC", bounded(text)))


def casefolded(text: str) -> str:
    """NFKC-normalised and case-folded, for comparisons. Bounded."""
    return bounded(unicodedata.normalize("NFKC", normalised(text).casefold()))


def text_of(message: Mapping[str, Any]) -> str:
    """The text of one message in OpenAI's shape: its content, or that of its parts of type text.

    Anything else (pictures, missing or malformed content) counts as no text: routing does not
    validate messages.
    """
    content = message.get("content")
    if isinstance(content, str):
        return bounded(content)
    if not isinstance(content, Sequence):
        return ""
    pieces: list[str] = []
    left = 2 * MAX_CHARACTERS
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "text":
            piece = part.get("text")
            if isinstance(piece, str):
                pieces.append(bounded(piece))
                left -= len(pieces[-1])
        if left <= 0:
            break
    return bounded("\n".join(pieces))


def last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user message; empty without one."""
    for message in reversed(messages):
        if message.get("role") == "user":
            return text_of(message)
    return ""


def conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The texts of all user messages, in order; the newest ones when they are too long."""
    pieces: list[str] = []
    left = MAX_CHARACTERS
    for message in reversed(messages):
        if message.get("role") == "user":
            piece = text_of(message)[: max(left, 0)]
            pieces.append(piece)
            left -= len(piece) + 1
        if left <= 0:
            break
    return "\n".join(reversed(pieces))


def tokenize(text: str) -> tuple[list[str], list[str]]:
    """The tokens that features are made of: words and marks, and runs of scripts without spaces.

    Marks begin with `=`, so that they never equal a word. A number becomes a mark with one 0 per
    digit: its value seldom tells whose prompt it is.
    """
    plain = bounded(text, LEARNED_CHARACTERS)
    if plain.isascii():
        found = _ASCII_TOKEN.findall(plain.lower())
        return [token if token.isalpha() else _mark(token) for token in found], []
    tokens: list[str] = []
    runs: list[str] = []
    for unspaced, digits, word, mark in _TOKEN.findall(casefolded(plain)):
        if unspaced:
            runs.append(unspaced)
        else:
            tokens.append(word or _mark("0" * len(digits) or mark))
    return tokens, runs


def _mark(token: str) -> str:
    return "=" + ("0" * len(token) if token.isdigit() else token)


def token_features(token: str) -> frozenset[str]:
    """Features of a word: the word and its n-grams of 3 to 5 characters, with a space at both ends;
    of a mark: the mark.
    """
    if token[0] == "=":
        return frozenset((token,))
    padded = f" {token[:40]} "
    grams = [padded[at : at + n] for n in (3, 4, 5) for at in range(len(padded) - n + 1)]
    return frozenset(["=" + token, *grams])


def run_features(run: str) -> set[str]:
    """Features of a run without spaces: its n-grams of 1 to 3 characters."""
    return {run[at : at + n] for n in (1, 2, 3) for at in range(len(run) - n + 1)}


_of_token_once = lru_cache(maxsize=8192)(token_features)


def features(text: str) -> set[str]:
    """The set of a text's features; frequencies do not count."""
    tokens, runs = tokenize(text)
    found: set[str] = set()
    for token in set(tokens):
        found.update(_of_token_once(token))
    for run in runs:
        found.update(run_features(run))
    return found


def word_set(text: str) -> frozenset[str]:
    """A text as the set of its words, and of the characters of scripts without spaces."""
    found: set[str] = set()
    for unspaced, digits, word, _ in _TOKEN.findall(casefolded(bounded(text, LEARNED_CHARACTERS))):
        found.update(unspaced)
        found.update(token for token in (digits, word) if token)
    return frozenset(found)
