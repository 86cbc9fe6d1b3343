"""What all tests of `quantize` share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from packhorse.quantize import run
from packhorse.quantize.plan import host, planner


@pytest.fixture(scope="session", autouse=True)
def measured_host() -> Iterator[None]:
    """Runs measure this machine's speed, which takes a quarter of one on a tiny model. Here it is
    measured once; a test in test_planner.py measures it.
    """
    measured = cache(host.this_host)
    with pytest.MonkeyPatch.context() as patched:
        for module in (planner, run):
            patched.setattr(module, "this_host", measured)
        yield
