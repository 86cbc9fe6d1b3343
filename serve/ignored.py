"""Fields of requests without effect: their names as clients are told them, and as metrics and the
log have them, from a closed set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from packhorse.serve import metrics

OTHER = "other"
MAX_TOLD = 32
# What goes into headers: an unknown name may be anything.
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,95}")


def told(names: Iterable[str]) -> tuple[str, ...]:
    """Each once, and no more than a header can hold."""
    plain = (name if PLAIN.fullmatch(name) else OTHER for name in names)
    return tuple(dict.fromkeys(plain))[:MAX_TOLD]


def counted(names: Sequence[str]) -> list[str]:
    """Count them; returns what the log may say of them."""
    known = [name if name in metrics.IGNORED_NAMES else OTHER for name in names]
    for name in known:
        metrics.IGNORED_FIELDS.labels(name).inc()
    return list(dict.fromkeys(known))
