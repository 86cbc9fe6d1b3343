"""Responses in memory: bounds, tenants and time."""

from __future__ import annotations

from packhorse.serve.cache.response_store import OVERHEAD_BYTES, MemoryResponses
from packhorse.serve.metrics import ServerMetrics

BODY = b"x" * 100
SIZE = OVERHEAD_BYTES + len(BODY)


class Clock:
    """Stands still until it is moved."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def memory(
    entries: int = 100, places: int = 100, clock: Clock | None = None
) -> tuple[MemoryResponses, ServerMetrics]:
    metrics = ServerMetrics()
    kept = MemoryResponses(
        max_entries=entries,
        max_bytes=places * SIZE,
        max_entry_bytes=2 * SIZE,
        ttl_s=60,
        clock=clock or Clock(),
        metrics=metrics,
    )
    return kept, metrics


def held(kept: MemoryResponses, tenant: str, count: int) -> list[int]:
    return [n for n in range(count) if kept.peek(tenant, str(n)) is not None]


async def test_who_holds_most_loses_its_oldest() -> None:
    for entries, places in ((4, 100), (100, 4)):
        kept, metrics = memory(entries, places)
        kept.put("quiet", "0", BODY)
        for number in range(50):
            kept.put("busy", str(number), BODY)
        assert held(kept, "quiet", 1) == [0]
        assert held(kept, "busy", 50) == [47, 48, 49]
        assert (kept.entries, kept.bytes) == (4, 4 * SIZE)
        value = metrics.registry.get_sample_value
        assert value("packhorse_responses_dropped_total", {"reason": "evicted"}) == 47
        assert value("packhorse_responses_kept") == 4
        assert value("packhorse_responses_kept_bytes") == 4 * SIZE
        await kept.close()


async def test_small_ones_of_one_tenant_push_out_no_large_ones_of_another() -> None:
    kept, _ = memory(entries=10)
    for number in range(3):
        kept.put("few", str(number), BODY)
    for number in range(50):
        kept.put("many", str(number), b"x")
    assert held(kept, "few", 3) == [0, 1, 2]
    assert len(held(kept, "many", 50)) == 7
    await kept.close()


async def test_a_response_is_one_tenants() -> None:
    kept, _ = memory()
    kept.put("a", "1", b"of a")
    kept.put("b", "1", b"of b")
    assert await kept.get("a", "1") == b"of a"
    assert await kept.get("c", "1") is None
    await kept.delete("a", "1")
    assert await kept.get("a", "1") is None
    assert await kept.get("b", "1") == b"of b"
    await kept.delete("a", "1")
    await kept.close()


async def test_what_is_put_again_counts_once() -> None:
    kept, _ = memory()
    for _ in range(3):
        kept.put("a", "1", BODY)
    assert (kept.entries, kept.bytes) == (1, SIZE)
    await kept.delete("a", "1")
    assert (kept.entries, kept.bytes) == (0, 0)
    await kept.close()


async def test_old_ones_end_and_free_their_memory() -> None:
    clock = Clock()
    kept, _ = memory(clock=clock)
    kept.put("a", "1", BODY)
    clock.now_s = 59.9
    assert await kept.get("a", "1") == BODY
    kept.put("b", "1", BODY)
    clock.now_s = 60
    assert await kept.get("a", "1") is None
    kept.put("b", "2", BODY)  # of whoever
    assert kept.entries == 2
    await kept.close()


async def test_what_is_too_large_is_not_kept() -> None:
    kept, metrics = memory()
    kept.put("a", "1", BODY)
    kept.put("a", "1", b"x" * 2 * SIZE)
    assert await kept.get("a", "1") is None, "nor what it replaces"
    labels = {"reason": "too_large"}
    assert metrics.registry.get_sample_value("packhorse_responses_dropped_total", labels) == 1
    none, _ = memory(entries=0)
    assert not none.fits(0)
    await kept.close()
