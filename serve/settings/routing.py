"""Settings of routing (routing/): which adapter answers requests for the model `auto`."""

from __future__ import annotations

from pathlib import Path

from packhorse.serve.settings.section import Section


class RoutingSettings(Section):
    enabled: bool = True
    """Whether a server with adapters has the model `auto`."""
    file: Path | None = None
    """The routes file (rules, default, thresholds), see docs/routing.md; read again when it
    changes.
    """
    base_name: bool = False
    """Whether requests that name the base model are routed, too."""
