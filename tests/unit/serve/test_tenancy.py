"""What keeps tenants apart, in stores and in the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from packhorse.serve.tenancy import Tenancy
from tests.unit.serve.cache.caching_pipeline import answer, make
from tests.unit.serve.cache.making import ask


def test_marks_tell_nothing_without_the_secret() -> None:
    one, other = Tenancy(b"secret" * 4), Tenancy(b"another" * 4)
    assert one.mark("acme") == one.mark("acme") != one.mark("acme2")
    assert one.mark("acme") != other.mark("acme")
    assert b"acme" not in one.mark("acme")


def test_salts_are_a_tenants_own_and_bounded() -> None:
    tenancy = Tenancy(b"secret" * 4)
    salts = [
        tenancy.prefix_cache_salt("acme", None),
        tenancy.prefix_cache_salt("other", None),
        tenancy.prefix_cache_salt("acme", "salt"),
        tenancy.prefix_cache_salt("other", "salt"),
        tenancy.prefix_cache_salt("acme", "s" * 1024),
    ]
    assert len(set(salts)) == len(salts)
    assert all(len(salt) == 32 and int(salt, 16) >= 0 for salt in salts)
    # A client cannot name another tenant's salt.
    assert tenancy.prefix_cache_salt("acme", tenancy.prefix_cache_salt("other", None)) not in salts


@pytest.mark.parametrize("has_cache", [True, False])
async def test_every_request_has_its_tenants_salt(has_cache: bool) -> None:
    """Also without a result cache, which has nothing to do with the engine's."""
    pipeline, engine = make(has_cache=has_cache)
    asked = [ask(tenant=name, temperature=0.7) for name in ("a", "b", "a")]
    asked += [replace(request, cache_salt="x") for request in asked[:2]]
    for request in asked:
        await answer(pipeline, request)
    a, b, again, salted_a, salted_b = engine.salts
    assert a == again
    assert len({a, b, salted_a, salted_b}) == 4
    assert None not in engine.salts


async def test_another_salt_of_a_client_is_another_result() -> None:
    """Behind a gateway with one key the salt is what tells its users apart."""
    pipeline, engine = make()
    alone = ask("one")
    one, other = (replace(alone, cache_salt=salt) for salt in ("of-user-a", "of-user-b"))
    marks = [(await answer(pipeline, request))[0] for request in (alone, one, other, one, alone)]
    assert marks == ["miss", "miss", "miss", "hit", "hit"]
    assert engine.generations == 3
