"""Who is to blame for the death of an engine. Whole supervisors are in test_supervisor.py."""

from __future__ import annotations

from packhorse.serve.engines.poison_detector import PoisonDetector, TrackedRequest
from packhorse.serve.engines.quarantine import Quarantine


def two() -> tuple[PoisonDetector, TrackedRequest, TrackedRequest, list[str]]:
    """Two requests, and the list of those that are found to be poison."""
    poisonous: list[str] = []
    quarantine = Quarantine(poison_ttl_s=60, suspicion_ttl_s=60)
    detector = PoisonDetector(quarantine, lambda suspect: poisonous.append(suspect.request_id))
    detector.engine_is_new(1)
    made = [TrackedRequest(detector, name, name.encode) for name in ("innocent", "poison")]
    return detector, made[0], made[1], poisonous


async def test_a_cleared_request_is_not_blamed_for_the_next_ones_poison() -> None:
    detector, innocent, poison, poisonous = two()
    for suspect in (innocent, poison):
        suspect.enters(1)
        suspect.lost(1)
    assert not poisonous, "two were there: nobody knows which it was"
    detector.engine_is_new(2)
    await innocent.wait_for_turn()
    innocent.enters(2)
    innocent.clear()  # it has lived longer than before, and goes on beside who comes next
    await poison.wait_for_turn()
    poison.enters(2)
    innocent.lost(2)
    poison.lost(2)
    assert poisonous == ["poison"]
    assert (innocent.is_culprit, poison.is_culprit) == (False, True)
    detector.no_engine_will_be()


async def test_poison_is_found_before_it_is_told_of_its_engine() -> None:
    """Its client may be slow to read, or gone; whether the engine is built again is decided now."""
    detector, innocent, poison, poisonous = two()
    for suspect in (innocent, poison):
        suspect.enters(1)
        suspect.lost(1)
    detector.engine_is_new(2)
    await poison.wait_for_turn()
    poison.enters(2)
    detector.engine_lost(2)
    assert poisonous == ["poison"]
    poison.lost(2)
    assert poisonous == ["poison"], "once"
    detector.no_engine_will_be()


async def test_who_waits_for_an_engine_did_not_end_it() -> None:
    detector, innocent, poison, poisonous = two()
    for suspect in (innocent, poison):
        suspect.enters(1)
        suspect.lost(1)
    detector.engine_is_new(2)
    await innocent.wait_for_turn()  # and is rendered, while that engine dies of something else
    detector.engine_lost(2)
    innocent.leave()
    assert not poisonous
    detector.no_engine_will_be()
