"""Who is to blame for the death of an engine. Whole supervisors are in test_supervisor.py."""

from __future__ import annotations

from packhorse.serve.engines.poison_detector import Suspect, Suspects
from packhorse.serve.engines.quarantine import Memory


def two() -> tuple[Suspects, Suspect, Suspect, list[str]]:
    """Two requests, and the list of those that are found guilty."""
    guilty: list[str] = []
    memory = Memory(poison_ttl_s=60, suspicion_ttl_s=60)
    suspects = Suspects(memory, lambda suspect: guilty.append(suspect.request_id))
    suspects.engine_is_new(1)
    made = [Suspect(suspects, name, name.encode) for name in ("innocent", "poison")]
    return suspects, made[0], made[1], guilty


async def test_who_was_acquitted_is_not_blamed_for_the_next_ones_poison() -> None:
    suspects, innocent, poison, guilty = two()
    for suspect in (innocent, poison):
        suspect.enters(1)
        suspect.lost(1)
    assert not guilty, "two were there: nobody knows which it was"
    suspects.engine_is_new(2)
    await innocent.turn()
    innocent.enters(2)
    innocent.clear()  # it has lived longer than before, and goes on beside who comes next
    await poison.turn()
    poison.enters(2)
    innocent.lost(2)
    poison.lost(2)
    assert guilty == ["poison"]
    assert (innocent.is_guilty, poison.is_guilty) == (False, True)
    suspects.no_engine_will_be()


async def test_poison_is_found_before_it_is_told_of_its_engine() -> None:
    """Its client may be slow to read, or gone; whether the engine is built again is decided now."""
    suspects, innocent, poison, guilty = two()
    for suspect in (innocent, poison):
        suspect.enters(1)
        suspect.lost(1)
    suspects.engine_is_new(2)
    await poison.turn()
    poison.enters(2)
    suspects.engine_lost(2)
    assert guilty == ["poison"]
    poison.lost(2)
    assert guilty == ["poison"], "once"
    suspects.no_engine_will_be()


async def test_who_waits_for_an_engine_did_not_end_it() -> None:
    suspects, innocent, poison, guilty = two()
    for suspect in (innocent, poison):
        suspect.enters(1)
        suspect.lost(1)
    suspects.engine_is_new(2)
    await innocent.turn()  # and is rendered, while that engine dies of something else
    suspects.engine_lost(2)
    innocent.leave()
    assert not guilty
    suspects.no_engine_will_be()
