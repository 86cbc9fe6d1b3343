"""What `make demo` shows, as a picture for README.md.

    FORCE_COLOR=1 COLUMNS=100 make demo > out/demo.ansi
    python tools/draw_demo.py out/demo.ansi --out docs/images/demo.svg

Draws the output of a real run, from the questions that choose an adapter up to the call over gRPC.
A section that is missing is an error. The picture holds its text, and names no font that would be
fetched from a network.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

WIDTH = 100
FIRST, LAST = "4. Let the question choose", "7. Ask over gRPC"
"""Titles of the first section that is drawn, and of the one behind the last."""


def drawn_part(output: str) -> str:
    """The lines of the sections that are drawn. Raises ValueError where one is missing."""
    lines = output.splitlines()
    starts = {
        title: next((number for number, line in enumerate(lines) if title in line), None)
        for title in (FIRST, LAST)
    }
    if missing := [title for title, number in starts.items() if number is None]:
        raise ValueError(f"the output has no section {', '.join(map(repr, missing))}")
    return "\n".join(lines[starts[FIRST] : starts[LAST]]).rstrip()


def draw(output: str) -> str:
    """The SVG of a terminal with these lines (with ANSI colours)."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(drawn_part(output)))
    format_without_fonts = re.sub(
        r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL
    )
    return console.export_svg(title="make demo", code_format=format_without_fonts, unique_id="demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="what `make demo` wrote, with colours")
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    arguments = parser.parse_args()
    try:
        picture = draw(arguments.output.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(str(error))
    arguments.out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
