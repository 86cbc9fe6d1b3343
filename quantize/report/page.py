"""Quality reports as one self-contained HTML page, and as a table for the terminal.

The page needs no network and no scripts, and follows the reader's light or dark mode. Called by
cli.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.markup import escape
from rich.table import Table

from packhorse.quantize.errors import BadInput
from packhorse.quantize.model.checkpoint import REPORT
from packhorse.quantize.report import plots
from packhorse.quantize.report.verdict import (
    ALL_LIMITS,
    LEVELS,
    MIN_PREDICTIONS,
    MIN_QUESTIONS,
    REPORT_VERSION,
    REQUIRED,
    Limits,
)
from packhorse.quantize.report.view import NOT_MEASURED, figures, number, percent, size, view_of

# (heading, figure, its formatter): the columns of the comparison.
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("scheme", "scheme", str),
    ("weights", "bytes", size),
    ("bits a weight", "bits_per_weight", partial(number, digits=3)),
    ("score kept", "score_kept", percent),
    ("perplexity ratio", "perplexity_ratio", number),
    ("KL mean (nats)", "kl_mean", partial(number, digits=3)),
    ("KL p99 (nats)", "kl_p99", partial(number, digits=3)),
    ("same likeliest token", "top1_agreement", percent),
)
# (figure, axis label, the better direction) for the vertical axis of the scatter plot: the first
# that was measured for two checkpoints.
_HEIGHTS = (
    ("kl_mean", "KL divergence, mean (nats)", "Lower"),
    ("perplexity_ratio", "perplexity, after / before", "Lower"),
    ("score_kept", "task score kept", "Higher"),
)


def load(folder: Path) -> dict[str, Any]:
    """The report of a checkpoint folder. Raises BadInput for a missing report or another version,
    with a way to fix it.
    """
    path = folder / REPORT
    if not path.is_file():
        raise BadInput(
            f"{folder} has no {REPORT}, so nothing is known of its quality; give a folder that "
            "`quantize model` made."
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}.") from error
    version = report.get("report_version", 1) if isinstance(report, dict) else None
    if version == REPORT_VERSION:
        try:
            figures(report, folder.name)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path} is no whole report: {error!r} is missing or wrong.") from error
        return dict(report)
    if isinstance(version, int) and version > REPORT_VERSION:
        raise BadInput(
            f"{path} has version {version}, newer than {REPORT_VERSION}, the newest that this "
            "Packhorse reads; update it."
        )
    raise BadInput(
        f"{path} has version {version}, older than {REPORT_VERSION}, which this Packhorse reads; "
        "quantize again for a full report, or look at the JSON itself."
    )


def names(folders: Sequence[Path]) -> list[str]:
    """Names for the folders: their last parts, or their paths when those are not unique."""
    last = [folder.absolute().name for folder in folders]
    same = len(set(last)) < len(last)
    return [str(folder) for folder in folders] if same else last


def rows(reports: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per checkpoint, for --json; see `view.figures`."""
    return [figures(report, name) for report, name in zip(reports, names, strict=True)]


def warnings(reports: Sequence[dict[str, Any]]) -> list[str]:
    """The reasons why the figures of these reports cannot be compared; empty when they can."""
    found = []
    if len({report["source"] for report in reports}) > 1:
        found.append("The checkpoints come from different originals: figures are of each its own.")
    eval_data = [report["quality"]["measured_with"] for report in reports]
    files = {json.dumps(one, sort_keys=True) for one in eval_data if one}
    if len(files) > 1:
        found.append("They were measured with different files: figures cannot be compared.")
    return found


def table(reports: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    """For the terminal, with one column per checkpoint."""
    compared = rows(reports, names)
    shown = Table(title="Quality", title_justify="left", caption="\n".join(warnings(reports)))
    shown.add_column("")
    for row in compared:
        shown.add_column(escape(row["name"]), justify="right", overflow="fold")
    shown.add_row("verdict", *(row["verdict"] for row in compared), end_section=True)
    for heading, key, show in COLUMNS:
        shown.add_row(heading, *(_cell(row[key], show) for row in compared))
    return shown


def render(reports: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The HTML page: one report in full, or a comparison followed by each report in full.

    Raises BadInput when matplotlib is not installed. The same reports give the same bytes.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared = rows(reports, names)
    return environment.get_template(
        "report.html"
    ).render(
        views=[
            view_of(report, name, place)
            for place, (report, name) in enumerate(zip(reports, names, strict=True))
        ],
        headings=[heading for heading, _, _ in COLUMNS],
        compared=[
            {**row, "cells": [_cell(row[key], show) for _, key, show in COLUMNS]}
            for row in compared
        ],
        warnings=warnings(reports),
        svg=Markup,  # plots.py escapes every name in a plot
        limits=[_limit_row(limits) for limits in ALL_LIMITS],
        levels=LEVELS,
        required=", ".join(REQUIRED[:-1]) + " and " + REQUIRED[-1],
        min_questions=MIN_QUESTIONS,
        min_predictions=f"{MIN_PREDICTIONS:,}",
        **_scatter(compared),
    )


def _scatter(compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scatter plot, if two checkpoints have a measure in common, and the names not on it."""
    for key, label, better in _HEIGHTS:
        have = [row for row in compared if row[key] is not None]
        if len(have) > 1:
            points = [plots.Point(row["name"], row["bytes"] / 1e6, row[key]) for row in have]
            without = [row["name"] for row in compared if row[key] is None]
            drawn = plots.scatter(points, label, "all")
            return {"scatter": drawn, "without": without, "better": better}
    return {"scatter": "", "without": [], "better": ""}


def _cell(value: Any, show: Callable[[Any], str]) -> str:
    return NOT_MEASURED if value is None else show(value)


def _limit_row(limits: Limits) -> tuple[str, ...]:
    sign = "≥" if limits.rising else "≤"
    shown = (
        f"{sign} {limit:.0%}" if limits.unit == "%" else f"{sign} {limit:g} {limits.unit}".strip()
        for limit in (limits.as_good, limits.good, limits.usable)
    )
    return limits.measure, *shown, limits.why
