"""What the planner learns of the machine it runs on."""

from __future__ import annotations

from packhorse.quantize.plan.host import this_host


def test_this_host_is_measured() -> None:
    assert this_host().flops_per_s > 1e8
