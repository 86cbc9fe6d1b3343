"""Names of request fields without effect, as clients, metrics and the log get them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from packhorse.serve.metrics import IGNORED_NAMES, ModelMetrics

OTHER = "other"
MAX_TOLD = 32
# An unknown field may have any name; only such names go into headers.
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,95}")


def told(names: Iterable[str]) -> tuple[str, ...]:
    """The names for clients: each once, and no more than a header can hold."""
    plain = (name if PLAIN.fullmatch(name) else OTHER for name in names)
    return tuple(dict.fromkeys(plain))[:MAX_TOLD]


def counted(names: Sequence[str], metrics: ModelMetrics) -> list[str]:
    """Count the fields; returns their names for the log, which are from a closed set."""
    known = [name if name in IGNORED_NAMES else OTHER for name in names]
    for name in known:
        metrics.ignored_fields.labels(name).inc()
    return list(dict.fromkeys(known))
