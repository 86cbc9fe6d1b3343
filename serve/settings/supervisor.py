"""Settings of the engine supervisor (engines/supervisor.py)."""

from __future__ import annotations

from pydantic import Field

from packhorse.serve.settings.section import Section


class SupervisorSettings(Section):
    """How often a new engine is built when one dies or hangs."""

    max_restarts: int = Field(5, ge=0)
    """With more engine failures than this within restart_window_s the server exits with 1."""
    restart_window_s: float = Field(600.0, gt=0)
    backoff_s: float = Field(1.0, ge=0)
    """Pause before the second rebuild of a window; it doubles with each further one, up to a
    minute.
    """
    build_timeout_s: float = Field(1800.0, gt=0)
    """An engine that is not built within this time has failed: its processes are killed."""
    poison_ttl_s: float = Field(3600.0, gt=0)
    """How long a request that has killed two engines is refused, and any request equal to it."""
