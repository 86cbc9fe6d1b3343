"""When a store is left alone. With real stores: tests/integration/test_stores.py."""

from __future__ import annotations

import pytest

from packhorse.serve.cache.circuit_breaker import MAX_REFUSALS, MAX_TIMEOUTS, CircuitBreaker


@pytest.mark.parametrize(
    ("reason", "bearable"), [("timeout", MAX_TIMEOUTS), ("refused", MAX_REFUSALS)]
)
def test_failures_of_one_kind_in_a_row_are_enough(reason: str, bearable: int) -> None:
    breaker = CircuitBreaker("store")
    assert breaker.is_open, "until it has answered once"
    breaker.close()
    for _ in range(bearable - 1):
        breaker.failed(reason)
    breaker.worked()
    for _ in range(bearable - 1):
        breaker.failed(reason)
    assert not breaker.is_open, "there was a success in between"
    breaker.failed(reason)
    assert breaker.is_open
    breaker.worked()
    assert breaker.is_open, "a late answer to an old question says nothing"
    breaker.close()
    assert not breaker.is_open
