"""The plots of the report page as SVG text, without fonts, colours or ids of their own.

Colours are CSS variables of the page, so that a plot works in light and dark mode; text stays text,
in the page's font. The same figures give the same bytes. Takes numbers and labels, not reports.
Called by page.py and view.py; matplotlib is imported when the first plot is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from packhorse.quantize.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that matplotlib can parse; each is replaced by a CSS variable in the end.
INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0101{number:02x}" for number in range(0x10, 0x18))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)
}
_MARKERS = "osD^vPX*"
WIDE, NARROW = (9.6, 3.5), (3.7, 3.0)
"""Inches. A narrow plot keeps its text readable on a phone."""
RINGED = "fell back"


@dataclass(frozen=True)
class Dot:
    """One layer: `block` counts from 0, `error` is relative and squared, `noted` draws a ring."""

    kind: str
    block: int
    error: float
    noted: bool


@dataclass(frozen=True)
class Point:
    """One checkpoint."""

    name: str
    megabytes: float
    value: float


def layers(dots: Sequence[Dot], ylabel: str, name: str) -> str:
    """Error by block, with one series per kind of layer. `name` makes the plot's ids unique."""
    kinds = list(dict.fromkeys(dot.kind for dot in dots))

    def draw(axes: Axes) -> None:
        for number, kind in enumerate(kinds):
            own = sorted((dot for dot in dots if dot.kind == kind), key=lambda dot: dot.block)
            colour = SERIES[number % len(SERIES)]
            once = len({dot.block for dot in own}) == len(own)  # experts: several per block
            axes.plot(
                [dot.block for dot in own],
                [dot.error for dot in own],
                color=colour,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4.5 if len(own) <= 40 else 3,
                linewidth=1.1 if once else 0,
                label=kind,
            )
        if noted := [dot for dot in dots if dot.noted]:
            axes.plot(
                [dot.block for dot in noted],
                [dot.error for dot in noted],
                color=INK,
                marker="o",
                markersize=10,
                markerfacecolor="none",
                linewidth=0,
                label=RINGED,
            )
        if all(dot.error > 0 for dot in dots):
            _plain_log(axes)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("decoder block")
        axes.set_ylabel(ylabel)
        _legend(axes)

    return _both(draw, name, f"{ylabel} by decoder block and kind of layer")


def histogram(edges: Sequence[float], counts: Sequence[int], name: str) -> str:
    """A histogram of changes of log-probabilities. Counts of predictions are on a logarithmic axis,
    as most changes are near zero and the others matter.
    """

    def draw(axes: Axes) -> None:
        widths = [right - left for left, right in pairwise(edges)]
        axes.bar(
            edges[:-1], counts, widths, align="edge", color=SERIES[0],
            edgecolor=PAPER, linewidth=0.6,
        )  # fmt: skip
        axes.margins(x=0.01)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_ylim(0.7, 1.4 * max(*counts, 1))
        _plain_log(axes)
        axes.set_xlabel("change of log-probability (nats)")
        axes.set_ylabel("predictions (log scale)")

    return _both(draw, name, "histogram of changes of log-probabilities")


def scatter(points: Sequence[Point], ylabel: str, name: str) -> str:
    """Size against quality, with the name of each checkpoint."""

    def draw(axes: Axes) -> None:
        axes.margins(0.15, 0.2)
        middle = (min(p.megabytes for p in points) + max(p.megabytes for p in points)) / 2
        for number, point in enumerate(points):
            axes.plot(
                point.megabytes, point.value, marker=_MARKERS[number % len(_MARKERS)],
                markersize=7, linewidth=0, color=SERIES[number % len(SERIES)],
            )  # fmt: skip
            left = point.megabytes <= middle
            axes.annotate(
                point.name if len(point.name) <= 24 else point.name[:23] + "…",
                (point.megabytes, point.value),
                xytext=(8 if left else -8, 0),
                textcoords="offset points",
                ha="left" if left else "right",
                va="center",
                color=INK,
                parse_math=False,
            )
        if all(point.value > 0 for point in points):
            _plain_log(axes)
        axes.set_xlabel("weights (MB)")
        axes.set_ylabel(ylabel)

    return _both(draw, name, f"size against {ylabel}")


def _legend(axes: Axes) -> None:
    figure: Any = axes.get_figure(root=True)
    # A legend of the figure takes height; one of the axes would take width, on a phone all of it.
    figure.legend(
        loc="outside upper left", ncols=8 if figure.get_figwidth() > NARROW[0] else 3,
        frameon=False, labelcolor=INK, handlelength=1.4, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def _both(draw: Callable[[Axes], None], name: str, label: str) -> str:
    """The plot for wide and for narrow windows; the page's CSS shows one of them."""
    parts = [
        f'<div class="{kind}">{_svg(draw, size, f"{name}-{kind}", label)}</div>'
        for kind, size in (("wide", WIDE), ("narrow", NARROW))
    ]
    return "".join(parts)


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], salt: str, label: str) -> str:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput(
            "the HTML page has plots, which matplotlib draws, and it is not installed: "
            "pip install 'packhorse[report]'; or leave --html out for the table alone."
        ) from error
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _cleaned(file.getvalue(), label)


def _plain_log(axes: Axes) -> None:
    """A logarithmic axis with plain numbers at its ticks, as powers need a font of their own."""
    axes.set_yscale("log", nonpositive="clip")
    low, high = axes.get_ylim()
    shown = (1, 2, 5) if high / low < 30 else (1,)

    def label(value: float, _: object) -> str:
        first = round(float(f"{value:e}".partition("e")[0]))
        return f"{value:,g}" if first in shown else ""

    axes.yaxis.set_major_formatter(label)
    axes.yaxis.set_minor_formatter(label)


# (part of matplotlib's SVG that does not fit into the page, its replacement).
_REPLACED = (
    (r"<metadata>.*?</metadata>", ""),
    (r"<style.*?</style>", ""),  # would apply to the whole page
    (r"<defs>\s*</defs>", ""),
    (r' id="[a-zA-Z0-9.]+_\d+"', ""),  # ids that nothing refers to; the others are hashes
    (r"(?<=<svg)([^>]*?) height=\"[^\"]*\"", r"\1"),
    (r"(?<=<svg)([^>]*?) width=\"[^\"]*\"", r"\1"),
    (r" font-family: [^;\"]*;?", ""),
    (r"\s*\n\s*", " "),
)


def _cleaned(svg: str, label: str) -> str:
    """The <svg> element alone, with the page's size, font and colours."""
    svg = svg[svg.index("<svg") :]
    for pattern, instead in _REPLACED:
        svg = re.sub(pattern, instead, svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
