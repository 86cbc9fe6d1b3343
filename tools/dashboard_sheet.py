"""Panels of a Grafana dashboard as one picture: cards in their places, lines, numbers, legends,
units. Called by draw_dashboard.py, which fills the panels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import dates, pyplot, ticker
from PIL import Image

COLUMNS = 24  # of Grafana's grid
CELL_WIDTH_PX, CELL_HEIGHT_PX, DPI = 76, 36, 100
HEADER_CELLS = 2

INK, FAINT, PAPER, SHEET, GRID = "#24292f", "#8b949e", "#ffffff", "#f4f5f7", "#e7ebef"
# Grafana's names for colours, as far as our dashboard uses them; then those of unnamed series.
NAMED = {
    "blue": "#3274d9",
    "green": "#299c46",
    "orange": "#e0752d",
    "red": "#d44a3a",
    "dark-red": "#ad0317",
    "purple": "#a352cc",
    "text": "#8b949e",
}
PALETTE = (
    *("#3274d9", "#e0752d", "#299c46", "#a352cc", "#d44a3a", "#0f9bb0", "#c9a227", "#7c6f64"),
    *("#d6409f", "#6b8e23"),
)
STEPS = (1, 2, 2.5, 5, 10)


@dataclass
class Series:
    name: str
    times_s: list[float]
    values: list[float]

    @property
    def is_empty(self) -> bool:
        return not any(map(math.isfinite, self.values))


@dataclass
class Panel:
    """A panel of the dashboard, and what its expressions gave."""

    spec: dict[str, Any]
    row: str
    series: list[Series] = field(default_factory=list)

    @property
    def place(self) -> dict[str, int]:
        """x, y, w and h in cells of Grafana's grid."""
        found: dict[str, int] = self.spec["gridPos"]
        return found

    @property
    def defaults(self) -> dict[str, Any]:
        found: dict[str, Any] = self.spec["fieldConfig"]["defaults"]
        return found

    @property
    def is_empty(self) -> bool:
        return all(one.is_empty for one in self.series)

    def coloured(self) -> list[tuple[Series, str]]:
        """Series that have values, in the dashboard's colour for the name or the palette's next."""
        chosen = {
            override["matcher"]["options"]: NAMED[override["properties"][0]["value"]["fixedColor"]]
            for override in self.spec["fieldConfig"]["overrides"]
        }
        free = [colour for colour in PALETTE if colour not in chosen.values()]
        shown = [one for one in self.series if not one.is_empty]
        rest = [one.name for one in shown if one.name not in chosen]
        return [
            (one, chosen.get(one.name) or free[rest.index(one.name) % len(free)]) for one in shown
        ]


class Sheet:
    """The picture: panels by Grafana's grid, the rows one below the other."""

    def __init__(self, panels: Sequence[Panel], end_s: float, minutes: float, title: str) -> None:
        self._start, self._end = at(end_s - minutes * 60), at(end_s)
        shift: dict[str, int] = {}  # of each row, from the dashboard's cells to the sheet's
        top = HEADER_CELLS
        for row in dict.fromkeys(panel.row for panel in panels):
            places = [panel.place for panel in panels if panel.row == row]
            first = min(place["y"] for place in places)
            top += 1 if row else 0
            shift[row] = top - first
            top += max(place["y"] + place["h"] for place in places) - first
        self._width, self._height = COLUMNS * CELL_WIDTH_PX, (top + 1) * CELL_HEIGHT_PX
        size = (self._width / DPI, self._height / DPI)
        self._figure = pyplot.figure(figsize=size, dpi=DPI, facecolor=SHEET)
        span = f"{minutes:g} minutes to {self._end:%Y-%m-%d %H:%M} UTC"
        self._text(12, 36, title, 20, weight="bold")
        self._text(self._width - 12, 36, span, 12, color=FAINT, ha="right")
        for row, cells in shift.items():
            first = min(panel.place["y"] for panel in panels if panel.row == row)
            self._text(12, (cells + first - 0.4) * CELL_HEIGHT_PX, row, 13, weight="bold")
        for panel in panels:
            self._card(panel, shift[panel.row])

    def note(self, text: str) -> None:
        """Below everything."""
        self._text(12, self._height - 18, text, 10.5, color=FAINT)

    def save(self, path: Path) -> None:
        """In 256 colours, a third of the bytes; k-means keeps the rare ones apart."""
        whole = io.BytesIO()
        self._figure.savefig(whole, dpi=DPI)
        pyplot.close(self._figure)
        with Image.open(whole) as picture:
            picture.convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)

    def _text(self, x_px: float, y_px: float, text: str, size: float, **options: Any) -> None:
        options = {"color": INK, "va": "center", **options}
        x, y = x_px / self._width, 1 - y_px / self._height
        self._figure.text(x, y, text, fontsize=size, **options)

    def _box(self, left: float, top: float, width: float, height: float) -> Any:
        """Pixels from the top left corner, as matplotlib's shares from the lower left one."""
        return (
            left / self._width,
            1 - (top + height) / self._height,
            width / self._width,
            height / self._height,
        )

    def _card(self, panel: Panel, shift: int) -> None:
        place, gap = panel.place, 5
        left, top = place["x"] * CELL_WIDTH_PX + gap, (place["y"] + shift) * CELL_HEIGHT_PX + gap
        width, height = place["w"] * CELL_WIDTH_PX - 2 * gap, place["h"] * CELL_HEIGHT_PX - 2 * gap
        x, y, w, h = self._box(left, top, width, height)
        self._figure.add_artist(
            pyplot.Rectangle(
                (x, y), w, h, facecolor=PAPER, edgecolor="#d8dee4", linewidth=0.8, zorder=-1,
                transform=self._figure.transFigure,
            )
        )  # fmt: skip
        self._text(left + 12, top + 18, panel.spec["title"], 11.5, weight="bold")
        if panel.is_empty:
            self._text(left + width / 2, top + height / 2, "no data", 12, color=FAINT, ha="center")
        elif panel.spec["type"] == "stat":
            self._stat(panel, left, top, width, height)
        else:
            self._lines(panel, left, top, width, height)

    def _stat(self, panel: Panel, left: float, top: float, width: float, height: float) -> None:
        one = next(one for one in panel.series if not one.is_empty)
        finite = [value for value in one.values if math.isfinite(value)]
        text, colour = stat_of(panel, finite[-1])
        self._text(
            left + width / 2, top + height / 2, text, 22, color=colour, ha="center", weight="bold"
        )
        axes = self._figure.add_axes(self._box(left + 1, top + height * 0.7, width - 2, 35))
        axes.axis("off")
        axes.plot(one.times_s, one.values, color=colour, linewidth=1.2)
        axes.fill_between(one.times_s, one.values, min(0.0, *finite), color=colour, alpha=0.12)
        axes.set(xmargin=0, ylim=(min(0.0, *finite), max(*finite, 0.001) * 1.1))

    def _lines(self, panel: Panel, left: float, top: float, width: float, height: float) -> None:
        shown = panel.coloured()
        lines = legend_lines([one.name for one, _ in shown], width)
        plot_width, plot_height = width - 98, height - 68 - 19 * lines
        axes = self._figure.add_axes(self._box(left + 80, top + 38, plot_width, plot_height))
        if panel.defaults["custom"]["stacking"]["mode"] == "normal":
            times_s, stacked = stacked_values([one for one, _ in shown])
            names, colours = [one.name for one, _ in shown], [colour for _, colour in shown]
            axes.stackplot(
                list(map(at, times_s)), stacked, labels=names, colors=colours, alpha=0.75, lw=0
            )
        else:
            for one, colour in shown:
                when = list(map(at, one.times_s))
                axes.plot(when, one.values, color=colour, linewidth=1.6, label=one.name)
                if len(shown) == 1:
                    axes.fill_between(when, one.values, 0, color=colour, alpha=0.1)
        self._style(axes, panel)
        axes.legend(
            loc="upper left", bbox_to_anchor=(-70 / plot_width, -26 / plot_height),
            ncols=-(-len(shown) // lines), frameon=False, fontsize=9.5, labelcolor=INK,
            handlelength=1.1, handletextpad=0.5, columnspacing=1.4, labelspacing=0.35,
            borderaxespad=0,
        )  # fmt: skip

    def _style(self, axes: Any, panel: Panel) -> None:
        low, high = axes.get_ylim()
        if not any(value > 0 for one in panel.series for value in one.values):
            high = 1  # a flat line at 0 needs a scale, too
        axes.set_ylim(panel.defaults.get("min", low), panel.defaults.get("max", high))
        axes.set_xlim(self._start, self._end)
        in_bytes = panel.defaults["unit"] == "bytes"
        axes.yaxis.set_major_locator(
            BinaryLocator() if in_bytes else ticker.MaxNLocator(4, steps=STEPS)
        )
        axes.yaxis.set_major_formatter(
            ticker.FuncFormatter(lambda value, _: formatted(value, panel.defaults["unit"]))
        )
        axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=3, maxticks=6))
        axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M", tz=UTC))
        axes.tick_params(labelsize=9.5, labelcolor=INK, length=0)
        axes.tick_params(axis="x", pad=7)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)


class BinaryLocator(ticker.Locator):
    """Ticks at whole multiples of a power of two, so that bytes read well."""

    def __call__(self) -> list[float]:
        low, high = self.axis.get_view_interval()
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        step = 2.0 ** math.ceil(math.log2(max(vmax - vmin, 4) / 5))
        return [step * n for n in range(math.ceil(vmin / step), math.floor(vmax / step) + 1)]


def at(moment_s: float) -> datetime:
    return datetime.fromtimestamp(moment_s, UTC)


def formatted(value: float, unit: str) -> str:
    """A value with its unit, short enough for an axis. `unit` is Grafana's word."""
    if unit == "s":
        if not value:
            return "0 s"
        if abs(value) >= 120:
            return f"{value / 60:.3g} min"
        scaled = ((value, "s"), (value * 1e3, "ms"), (value * 1e6, "µs"))
        number, word = next((one for one in scaled if abs(one[0]) >= 1), scaled[-1])
        return f"{number:.3g} {word}"
    if unit == "bytes":
        for power, word in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
            if abs(value) >= 1024**power:
                return f"{value / 1024**power:.3g} {word}"
        return f"{value:.3g} B"
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    words = {"reqps": " req/s", "watt": " W", "celsius": " °C", "short": "", "none": ""}
    word = words[unit] if unit in words else " " + unit.removeprefix("suffix:").strip()
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + word


def stat_of(panel: Panel, value: float) -> tuple[str, str]:
    """What a stat panel shows, and in which colour."""
    for mapping in panel.defaults["mappings"]:
        if (option := mapping["options"].get(f"{value:g}")) is not None:
            return option["text"], NAMED[option["color"]]
    steps = panel.defaults["thresholds"]["steps"]
    reached = [step for step in steps if step["value"] is None or value >= step["value"]]
    return formatted(value, panel.defaults["unit"]), NAMED[reached[-1]["color"]]


def legend_lines(names: Sequence[str], width_px: float) -> int:
    """How many lines a legend takes, in columns of one width."""
    column = max(map(len, names)) * 6.6 + 38
    return -(-len(names) // max(1, int((width_px - 20) // column)))


def stacked_values(series: Sequence[Series]) -> tuple[list[float], list[list[float]]]:
    """All on one grid of times; what is not there counts as 0."""
    grid = sorted({moment for one in series for moment in one.times_s})
    rows = []
    for one in series:
        known = dict(zip(one.times_s, one.values, strict=True))
        values = [known.get(moment, 0.0) for moment in grid]
        rows.append([value if math.isfinite(value) else 0.0 for value in values])
    return grid, rows
