"""The times of a request in the engine, from vLLM's statistics of it."""

from __future__ import annotations

from typing import Any

from packhorse.serve.messages import EngineTimes


def times_of(stats: Any) -> EngineTimes | None:
    """Of vLLM's RequestStateStats, which are None when its statistics are off."""
    if stats is None:
        return None
    return EngineTimes(
        stats.queued_ts, stats.scheduled_ts, stats.first_token_ts, stats.last_token_ts
    )
