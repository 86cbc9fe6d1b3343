"""Settings of access control (access/), see docs/access.md."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from packhorse.serve.settings.section import Section

WithoutKeys = Literal["loopback", "inference", "everything"]


class AuthSettings(Section):
    keys_file: Path | None = None
    """YAML or JSON file with the list of keys; read again when it changes."""
    api_key: SecretStr | None = None
    """One key for inference and metrics, for a server without a keys file."""
    admin_key: SecretStr | None = None
    """One key for everything, beside api_key or alone."""
    without_keys: WithoutKeys = "inference"
    """What callers may do where no key is configured. `inference`: infer and read /metrics;
    operators' calls only from this machine or on http.admin_port. `loopback`: the same, and the
    server starts only where no other machine reaches it. `everything`: all calls, from anywhere.
    """
    open_metrics: bool = False
    """GET /metrics needs no key: gateways in front of several servers send none."""

    @property
    def has_keys(self) -> bool:
        return any(key is not None for key in (self.keys_file, self.api_key, self.admin_key))
