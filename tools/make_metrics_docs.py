"""Write the table of docs/metrics.md from what `serve/metrics.py` declares: `make metrics-docs`.

    python tools/make_metrics_docs.py [--check]

`--check` writes nothing and exits with 1 when the page is not what would be written; a test of
tests/rules does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase

from packhorse.serve.metrics import RENAMED, ModelMetrics, ServerMetrics
from packhorse.serve.telemetry.machine import Gpus, Machine

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/metrics.md"

BEGIN = "<!-- generated from serve/metrics.py by `make metrics-docs`; a test compares -->\n"
END = "<!-- end of what is generated -->\n"
HEAD = "| metric | type | labels | what it says |\n|---|---|---|---|\n"
OLD_NAMES = "\nOld names, exported beside the new ones until the next release:\n\n"
BUCKETS = "\nBuckets, in seconds unless the name says otherwise:\n\n"


def labels_of(collector: Any, family: Metric) -> tuple[str, ...]:
    """Declared ones; those of a family that is made when it is scraped are its own."""
    names = getattr(collector, "_labelnames", None)
    return tuple(names if names is not None else getattr(family, "_labelnames", ()))


def declared() -> Iterator[tuple[str, str, tuple[str, ...], str, tuple[float, ...]]]:
    """(exported name, type, labels, help, buckets), in the order of the file."""
    server, model = vars(ServerMetrics()).values(), vars(ModelMetrics()).values()
    for collectors, added in (((*server, Machine(), Gpus()), ()), (model, ("model",))):
        for collector in collectors:
            if not isinstance(collector, MetricWrapperBase | Machine | Gpus):
                continue
            if getattr(collector, "_labelvalues", ()):
                continue  # one series of another
            bounds = tuple(getattr(collector, "_upper_bounds", ()))
            for family in collector.describe():
                name = family.name + ("_total" if family.type == "counter" else "")
                labels = (*added, *labels_of(collector, family))
                yield name, family.type, labels, family.documentation, bounds


def table() -> str:
    rows, buckets = [], {}
    for name, kind, labels, text, bounds in declared():
        shown = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{name}` | {kind} | {shown} | {text} |\n")
        if bounds:
            row = ", ".join(f"{bound:g}" for bound in bounds if bound != float("inf"))
            buckets.setdefault(row, []).append(f"`{name}`")
    listed = "".join(f"- {', '.join(names)}: {row}\n" for row, names in buckets.items())
    renamed = "".join(f"- `{old}` is `{new}`\n" for new, old in RENAMED.items())
    return HEAD + "".join(rows) + BUCKETS + listed + OLD_NAMES + renamed


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = before + BEGIN + table() + END + after
    if "--check" in sys.argv:
        if made != text:
            print("docs/metrics.md is not what serve/metrics.py says; run make metrics-docs")
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
