"""The picture of `make demo` in README.md: drawn from a run's output, and of sections that the demo
still has.
"""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tools.draw_demo import FIRST, LAST, draw, drawn_part

OUTPUT = f"""
{FIRST} the adapter \x1b[92m────\x1b[0m
\x1b[36myou\x1b[0m   How much?
{LAST}
not drawn
"""


def test_the_sections_between_the_titles_are_drawn() -> None:
    picture = draw(OUTPUT)
    assert "How&#160;much?" in picture
    assert "drawn" not in picture
    assert "@font-face" not in picture  # it would be fetched from a network


def test_a_missing_section_is_an_error() -> None:
    with pytest.raises(ValueError, match="Ask over gRPC"):
        drawn_part(FIRST)


def test_the_picture_shows_what_the_demo_has() -> None:
    demo = (ROOT / "demo/run.py").read_text(encoding="utf-8")
    picture = (ROOT / "docs/images/demo.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    for title in (FIRST, LAST):
        assert f'step("{title}' in demo
    assert FIRST in picture
    assert len(picture) < 50_000
