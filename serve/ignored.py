"""Fields of requests without effect, as metrics and the log name them: from a closed set, because a
client may send any name.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve import metrics

OTHER = "other"


def counted(names: Sequence[str]) -> list[str]:
    """Count them; returns what the log may say of them."""
    known = [name if name in metrics.IGNORED_NAMES else OTHER for name in names]
    for name in known:
        metrics.IGNORED_FIELDS.labels(name).inc()
    return list(dict.fromkeys(known))
