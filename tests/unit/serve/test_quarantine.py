"""What is remembered of requests that were there when engines died, and for how long."""

from __future__ import annotations

from packhorse.serve.engines.quarantine import Quarantine
from packhorse.serve.messages import GenerateRequest, Prompt, Route, Sampling

ROUTE = Route("model")
REQUEST = GenerateRequest("id", "model", Sampling(), prompt="x")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def quarantine(clock: Clock, most: int = 100) -> Quarantine:
    return Quarantine(poison_ttl_s=3600, suspicion_ttl_s=600, most=most, clock=clock)


def test_poison_is_known_for_its_time() -> None:
    clock = Clock()
    known = quarantine(clock)
    known.add_poison(b"a")
    clock.now_s += 3599
    assert known.is_poison(b"a")
    assert not known.is_empty
    clock.now_s += 2
    assert not known.is_poison(b"a")
    assert known.is_empty


def test_a_suspicion_holds_for_its_time() -> None:
    clock = Clock()
    known = quarantine(clock)
    known.add_suspect(b"a", frozenset({1}), 0.5)
    clock.now_s += 599
    found = known.suspicion(b"a")
    assert found is not None
    assert (found.engines, found.lived_s) == ({1}, 0.5)
    clock.now_s += 2
    assert known.suspicion(b"a") is None
    assert known.is_empty


def test_deaths_of_equal_requests_add_up_until_one_is_cleared() -> None:
    known = quarantine(Clock())
    known.add_suspect(b"a", frozenset({1}), 0.5)
    known.add_suspect(b"a", frozenset({2}), 0.7)
    found = known.suspicion(b"a")
    assert found is not None
    assert (found.engines, found.lived_s) == ({1, 2}, 0.7)
    known.clear(b"a")
    assert known.suspicion(b"a") is None


def test_the_oldest_go_when_there_are_too_many() -> None:
    known = quarantine(Clock(), most=3)
    for number in range(5):
        known.add_poison(bytes([number]))
        known.add_suspect(bytes([number + 100]), frozenset({1}), 0.1)
    assert [known.is_poison(bytes([number])) for number in range(5)] == [False] * 2 + [True] * 3
    assert [known.suspicion(bytes([n + 100])) is None for n in range(5)] == [True] * 2 + [False] * 3


def test_poison_is_no_suspect_any_more() -> None:
    known = quarantine(Clock())
    known.add_suspect(b"a", frozenset({1}), 0.5)
    known.add_poison(b"a")
    assert known.suspicion(b"a") is None


def test_fingerprints_are_of_this_process_alone() -> None:
    """Nobody can test whether a prompt is in a memory dump that was stolen."""
    prompt = Prompt([1, 2, 3], 10)
    one, two = quarantine(Clock()), quarantine(Clock())
    assert one.fingerprint(prompt, REQUEST, ROUTE) == one.fingerprint(prompt, REQUEST, ROUTE)
    assert one.fingerprint(prompt, REQUEST, ROUTE) != two.fingerprint(prompt, REQUEST, ROUTE)
    assert one.fingerprint(Prompt([1, 2, 4], 10), REQUEST, ROUTE) != one.fingerprint(
        prompt, REQUEST, ROUTE
    )
