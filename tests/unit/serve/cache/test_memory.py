"""The memory tier, and flushes of it."""

from __future__ import annotations

from packhorse.serve.cache.invalidation import Epochs
from packhorse.serve.cache.memory import OVERHEAD_BYTES, MemoryTier
from packhorse.serve.metrics import ModelMetrics
from tests.unit.serve.cache.making import key


def test_the_least_recently_used_goes_first() -> None:
    metrics = ModelMetrics()
    memory = MemoryTier(3 * (OVERHEAD_BYTES + 100), metrics=metrics)
    for number in range(3):
        memory.put(key(number), bytes(100), 60)
    assert memory.get(key(0)) == bytes(100)
    memory.put(key(3), bytes(100), 60)
    assert memory.get(key(1)) is None
    assert [memory.get(key(number)) is not None for number in (0, 2, 3)] == [True] * 3
    assert metrics.registry.get_sample_value("packhorse_cache_evictions_total") == 1
    memory.put(key(4), bytes(10**6), 60)  # larger than all of it
    assert memory.get(key(4)) is None
    assert memory.amount("all") == (3, 3 * (OVERHEAD_BYTES + 100))


def test_nothing_fits_into_nothing() -> None:
    memory = MemoryTier(0)
    memory.put(key(1), b"x", 60)
    assert memory.get(key(1)) is None


def test_old_ones_end() -> None:
    now_s = 0.0
    memory = MemoryTier(10**6, clock=lambda: now_s)
    memory.put(key(1), b"x", 60)
    now_s = 59.9
    assert memory.get(key(1)) == b"x"
    now_s = 60.0
    assert memory.get(key(1)) is None
    assert memory.amount("all") == (0, 0)


def test_a_scope_is_dropped_alone() -> None:
    memory = MemoryTier(10**6)
    memory.put(key(1, adapter="clinic", tenant="aa"), b"x", 60)
    memory.put(key(2, adapter="clinic", tenant="bb"), b"x", 60)
    memory.put(key(3, adapter="", tenant="aa"), b"x", 60)
    assert [memory.amount(f"{scope}")[0] for scope in ("all", "adapter:clinic", "tenant:aa")] == [
        3,
        2,
        2,
    ]
    memory.drop("adapter:clinic")
    assert [memory.get(key(number)) is not None for number in (1, 2, 3)] == [False, False, True]
    memory.drop("model:echo")
    assert memory.amount("all") == (0, 0)


def test_epochs_only_rise() -> None:
    now_s = 1000.0
    epochs = Epochs(clock=lambda: now_s)
    assert epochs.of(("all", "adapter:a")) == ["", ""]
    epochs.bump("all")
    first = epochs.seen["all"]
    now_s = 900.0  # a clock that was put back
    epochs.bump("all")
    assert epochs.seen["all"] > first
    epochs.bump("adapter:a")
    assert epochs.of(("all", "adapter:a"))[1] > epochs.of(("all", "adapter:a"))[0]


def test_replicas_agree_on_the_highest() -> None:
    one, two = Epochs(clock=lambda: 1000.0), Epochs(clock=lambda: 2000.0)
    one.bump("adapter:a")
    two.bump("tenant:t")
    assert one.merge(two.seen)
    assert two.merge(one.seen)
    assert one.seen == two.seen
    assert not one.merge(two.seen)
    assert not one.merge({"adapter:a": "0" * 16})


def test_a_flush_of_everything_makes_room() -> None:
    """Else every tenant ever flushed would stay for ever."""
    epochs = Epochs()
    for number in range(100):
        epochs.bump(f"tenant:{number}")
    before = epochs.of(("all", "model:m", "adapter:", "tenant:3"))
    epochs.bump("all")
    assert list(epochs.seen) == ["all"]
    assert epochs.of(("all", "model:m", "adapter:", "tenant:3")) != before
