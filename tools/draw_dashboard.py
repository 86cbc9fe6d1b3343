"""The Grafana dashboard as a picture, without Grafana: its panels in their places, filled by the
Prometheus that scrapes the servers. Also a check that no panel is empty after a mixed load.

    python tools/draw_dashboard.py --prometheus http://127.0.0.1:9090 --minutes 5 --out FILE.png

Reads what our dashboard uses of Grafana's format (rows, stat and timeseries panels, units, legends,
colours, stacking), and no more. A collapsed row is drawn when it has data; without, as the GPU's on
a machine that has none, it is left out and named below the picture. Ends with 1 when a panel of
another row is empty.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dashboard_sheet import Panel, Series, Sheet

DASHBOARD = Path(__file__).resolve().parent.parent / "deploy/grafana/dashboards/packhorse.json"
POINTS = 240


@dataclass
class Source:
    """Prometheus' HTTP API, and the time that is looked at."""

    url: str
    end_s: float
    minutes: float
    step_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.step_s = max(1.0, round(self.minutes * 60 / POINTS))

    def ask(self, path: str, **parameters: Any) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=60) as answer:
            return json.load(answer)["data"]

    def rate_interval_s(self) -> float:
        """Grafana's $__rate_interval, made of the slowest target's scrape interval."""
        targets = self.ask("targets", state="active")["activeTargets"]
        if not targets:
            sys.exit(f"{self.url} scrapes nothing yet; it takes some seconds after its start.")
        scrape_s = max(seconds(target["scrapeInterval"]) for target in targets)
        return max(self.step_s + scrape_s, 4 * scrape_s)

    def range(self, expression: str) -> list[tuple[dict[str, str], list[float], list[float]]]:
        """Of each series its labels, times and values."""
        found = self.ask(
            "query_range",
            query=expression,
            start=self.end_s - self.minutes * 60,
            end=self.end_s,
            step=self.step_s,
        )["result"]
        return [
            (one["metric"], [t for t, _ in one["values"]], [float(v) for _, v in one["values"]])
            for one in found
        ]


def seconds(duration: str) -> float:
    """`1m30s` as Prometheus writes it."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"([\d.]+)(ms|s|m|h)", duration))


def expanded(expression: str, *, rate_s: float, range_s: float) -> str:
    """The expression with Grafana's variables replaced; for all servers and models."""
    values = {
        "$__rate_interval": f"{rate_s:.0f}s",
        "$__range": f"{range_s:.0f}s",
        "$instance": ".*",
        "$model": ".*",
    }
    for name, value in values.items():
        expression = expression.replace(name, value)
    if "$" in expression:
        raise ValueError(f"{expression}: a variable that is not known here; known: {list(values)}")
    return expression


def legend(pattern: str, labels: dict[str, str]) -> str:
    """Grafana's legend format."""
    name = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), pattern)
    return name.strip() or ", ".join(labels.values())


def panels_of(dashboard: dict[str, Any]) -> list[Panel]:
    """In reading order, each with the title of its row."""
    found, row = [], ""
    for spec in dashboard["panels"]:
        if spec["type"] == "row":
            row = spec["title"]
            found += [Panel(inner, row) for inner in spec["panels"]]
        else:
            found.append(Panel(spec, row))
    return found


def fill(panels: Sequence[Panel], source: Source) -> None:
    """Ask for every expression of every panel."""
    rate_s = source.rate_interval_s()
    for panel in panels:
        for target in panel.spec["targets"]:
            expression = expanded(target["expr"], rate_s=rate_s, range_s=source.minutes * 60)
            for labels, times_s, values in source.range(expression):
                name = legend(target["legendFormat"], labels)
                panel.series.append(Series(name, times_s, values))


def draw(dashboard: dict[str, Any], source: Source, out: Path) -> list[str]:
    """Write the picture; the titles of panels that are empty though they should not be."""
    panels = panels_of(dashboard)
    fill(panels, source)
    collapsed = [spec["title"] for spec in dashboard["panels"] if spec.get("collapsed")]
    with_data = {panel.row for panel in panels if not panel.is_empty}
    absent = [row for row in collapsed if row not in with_data]
    drawn = [panel for panel in panels if panel.row not in absent]
    sheet = Sheet(drawn, source.end_s, source.minutes, dashboard["title"])
    for row in absent:
        sheet.note(f"Not drawn: the row {row}, of which this server has no series.")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return [panel.spec["title"] for panel in drawn if panel.is_empty]


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the Grafana dashboard from Prometheus.")
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--until", type=float, help="seconds since 1970; unset: now")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD)
    asked = parser.parse_args()
    source = Source(asked.prometheus.rstrip("/"), asked.until or time.time(), asked.minutes)
    empty = draw(json.loads(asked.dashboard.read_text(encoding="utf-8")), source, asked.out)
    print(asked.out)
    for title in empty:
        print(f"no data: {title}", file=sys.stderr)
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
