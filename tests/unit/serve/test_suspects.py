"""Who is to blame for the death of an engine. Whole supervisors are in test_supervisor.py."""

from __future__ import annotations

from serve.engines.suspects import Suspect, Suspects


async def test_who_was_acquitted_is_not_blamed_for_the_next_ones_poison() -> None:
    suspects = Suspects()
    suspects.engine_is_new(1)
    innocent, poison = Suspect(suspects), Suspect(suspects)
    for suspect in (innocent, poison):
        suspect.enters()
    assert not innocent.lost(1)
    assert not poison.lost(1), "two were there: nobody knows which it was"
    suspects.engine_is_new(2)
    await innocent.turn()
    innocent.enters()
    innocent.acquit()  # it has lived longer than before, and goes on beside who comes next
    await poison.turn()
    poison.enters()
    assert not innocent.lost(2)
    assert poison.lost(2)
    suspects.no_engine_will_be()
