"""What tests of `serve` share."""

from __future__ import annotations

import pytest


@pytest.fixture
def checked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor looks at its engine fifty times a second and not twice, so that tests of what it
    finds do not wait for it.
    """
    monkeypatch.setattr("packhorse.serve.engines.supervisor.CHECK_EVERY_S", 0.02)
