"""What is refused, with which wait, and that every count comes back whatever happens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packhorse.serve.errors import Overloaded
from packhorse.serve.limits.admission import Admission, Cost, EnginePermit, InFlightPermit
from packhorse.serve.messages import ANONYMOUS, Caller
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.settings.admission import AdmissionSettings

BATCH = Caller("batch", "batch", frozenset({"inference"}))


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(clock: Clock | None = None, **limits: Any) -> Admission:
    return Admission(AdmissionSettings(**limits), clock=clock or Clock())


def refusal(work: Any) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        work()
    return caught.value


def test_calls_at_once_are_limited_and_a_permit_is_left_once() -> None:
    metrics = ModelMetrics()
    admission = Admission(AdmissionSettings(max_in_flight=2), metrics=metrics)
    permits = [admission.enter(ANONYMOUS) for _ in range(2)]
    error = refusal(lambda: admission.enter(ANONYMOUS))
    assert "handles 2 requests" in error.message
    assert 1 <= error.retry_after_s <= 60
    refused = {"reason": "in_flight"}
    assert metrics.registry.get_sample_value("packhorse_admission_refusals_total", refused) == 1
    permits[0].leave()
    permits[0].leave()
    admission.enter(ANONYMOUS)
    refusal(lambda: admission.enter(ANONYMOUS))


def test_calls_without_the_engine_are_calls_but_nobody_makes_room_for_them() -> None:
    admission = make(max_in_flight=2)
    made_room = 0

    def entered() -> None:
        nonlocal made_room
        made_room += 1

    admission.entered = entered
    upload, chat = admission.enter(ANONYMOUS, uses_engine=False), admission.enter(ANONYMOUS)
    assert (admission.in_flight, admission.in_flight_for_engine, made_room) == (2, 1, 1)
    refusal(lambda: admission.enter(ANONYMOUS, uses_engine=False))
    for permit in (upload, chat, upload):
        permit.leave()
    assert (admission.in_flight, admission.in_flight_for_engine) == (0, 0)


def test_a_full_server_refuses_before_it_renders() -> None:
    admission = make(max_in_engine=1, max_queued_tokens=10)
    limited = replace(BATCH, requests_per_minute=1)
    admission.check_room(ANONYMOUS)
    (permit,) = admission.admit(ANONYMOUS, [Cost(10, 5)])
    assert "answers to write" in refusal(lambda: admission.check_room(ANONYMOUS)).message
    permit.ended(15)
    admission.check_room(limited)
    admission.check_room(limited)  # takes nothing
    admission.admit(limited, [])
    assert "requests per minute" in refusal(lambda: admission.check_room(limited)).message
    admission.max_in_engine = 2
    admission.admit(ANONYMOUS, [Cost(10, 5)])
    assert "tokens wait" in refusal(lambda: admission.check_room(ANONYMOUS)).message


def test_one_keys_limit_is_not_anothers() -> None:
    admission = make()
    limited = replace(BATCH, max_concurrent=1)
    place = admission.enter(limited)
    assert "'batch' has 1 requests running" in refusal(lambda: admission.enter(limited)).message
    admission.enter(ANONYMOUS)
    place.leave()
    admission.enter(limited)


def test_the_engine_gets_at_most_so_many_answers() -> None:
    admission = make(max_in_engine=4)
    (first,) = admission.admit(BATCH, [Cost(10, 10, choices=3)])
    assert "limit of 4" in refusal(lambda: admission.admit(BATCH, [Cost(1, 1)] * 2)).message
    first.begun()
    refusal(lambda: admission.admit(BATCH, [Cost(1, 1)] * 2))
    first.ended(20)
    assert len(admission.admit(BATCH, [Cost(1, 1)] * 4)) == 4


def test_queued_tokens_are_those_of_requests_without_an_answer() -> None:
    admission = make(max_queued_tokens=100)
    (first,) = admission.admit(BATCH, [Cost(80, 10)])
    message = refusal(lambda: admission.admit(BATCH, [Cost(30, 1)])).message
    assert "80 prompt tokens wait" in message
    assert "limit of 100" in message
    first.begun()
    assert admission.queued_tokens == 0
    admission.admit(BATCH, [Cost(30, 1)])


def test_what_is_larger_than_a_limit_runs_when_nothing_else_does() -> None:
    admission = make(max_queued_tokens=100, max_in_engine=2)
    (huge,) = admission.admit(BATCH, [Cost(5000, 10)])
    refusal(lambda: admission.admit(BATCH, [Cost(1, 1)]))
    huge.ended(5000)
    assert len(admission.admit(BATCH, [Cost(1, 1)] * 7)) == 7


def test_open_limits_are_set_from_the_engine_and_given_ones_stay() -> None:
    admission = make(max_queued_tokens=100)
    admission.fit(max_num_seqs=8, kv_cache_tokens=10_000)
    assert (admission.max_in_engine, admission.max_queued_tokens) == (12, 100)
    admission = make(max_in_engine=3)
    admission.fit(max_num_seqs=8, kv_cache_tokens=10_000)
    assert (admission.max_in_engine, admission.max_queued_tokens) == (3, 15_000)
    admission.fit(max_num_seqs=0, kv_cache_tokens=0)  # unknown
    assert (admission.max_in_engine, admission.max_queued_tokens) == (3, 15_000)


def test_a_refused_call_takes_nothing() -> None:
    admission = make(max_in_engine=1)
    limited = replace(BATCH, tokens_per_minute=100, requests_per_minute=2)
    (other,) = admission.admit(ANONYMOUS, [Cost(1, 1)])
    for _ in range(5):
        assert "limit of 1" in refusal(lambda: admission.admit(limited, [Cost(40, 10)])).message
    other.ended(2)
    admission.admit(limited, [Cost(40, 60)])


@pytest.mark.parametrize("used", [100, 60, 10, 0])
def test_who_waits_as_long_as_told_is_let_in(used: int) -> None:
    clock = Clock()
    admission = make(clock)
    limited = replace(BATCH, tokens_per_minute=100)
    (first,) = admission.admit(limited, [Cost(50, 50)])
    first.ended(used)
    left = 100 - used
    if left:
        admission.admit(limited, [Cost(left, 0)])[0].ended(left)
    error = refusal(lambda: admission.admit(limited, [Cost(20, 10)]))
    assert error.retry_after_s == pytest.approx(30 * 60 / 100)
    assert "tokens, prompt and answer" in error.message
    clock.now_s += error.retry_after_s * 0.9
    refusal(lambda: admission.admit(limited, [Cost(20, 10)]))
    clock.now_s += error.retry_after_s * 0.1
    admission.admit(limited, [Cost(20, 10)])


def test_a_quota_does_not_pile_up_and_a_larger_call_leaves_a_debt() -> None:
    clock = Clock()
    admission = make(clock)
    limited = replace(BATCH, tokens_per_minute=60)
    clock.now_s += 3600
    admission.admit(limited, [Cost(100, 20)])[0].ended(120)
    assert refusal(lambda: admission.admit(limited, [Cost(1, 0)])).retry_after_s == (
        pytest.approx(61)  # the 60 that it owes, and the one that it wants
    )


@pytest.mark.parametrize("sends_max_tokens", [False, True])
def test_ordinary_clients_get_what_their_quota_allows(sends_max_tokens: bool) -> None:
    """16 clients, answers of 10 to 200 tokens where 8,000 are allowed, each of which takes 2 s; in
    the clock's time. They may together use 12,000 tokens a minute.
    """
    chooser = Random(1)
    clock = Clock()
    admission = make(clock)
    limited = replace(BATCH, tokens_per_minute=12_000)
    began_s, minutes, used = clock.now_s, 10, 0
    running: list[tuple[float, int, EnginePermit]] = []
    waits_until_s = [clock.now_s] * 16
    while clock.now_s < began_s + minutes * 60:
        for ends_s, tokens, permit in [one for one in running if one[0] <= clock.now_s]:
            running.remove((ends_s, tokens, permit))
            permit.ended(tokens)
            used += tokens
        for client, until_s in enumerate(waits_until_s):
            if until_s > clock.now_s:
                continue
            answer = 4096 if sends_max_tokens else 8000
            try:
                (permit,) = admission.admit(limited, [Cost(50, answer)])
            except Overloaded as error:
                waits_until_s[client] = clock.now_s + error.retry_after_s
                continue
            tokens = 50 + chooser.randrange(10, 200)
            running.append((clock.now_s + 2, tokens, permit))
            waits_until_s[client] = clock.now_s + 2
        clock.now_s += 0.05
    allowed = 12_000 * (minutes + 1)  # a bucket starts full
    assert 0.9 * allowed <= used <= allowed + 16 * 250


def test_an_estimate_that_was_too_low_leaves_a_debt() -> None:
    clock = Clock()
    admission = make(clock)
    limited = replace(BATCH, tokens_per_minute=6000)
    for _ in range(40):
        admission.admit(limited, [Cost(10, 8000)])[0].ended(11)
    clock.now_s += 60
    permits = [admission.admit(limited, [Cost(10, 8000)])[0] for _ in range(10)]
    for permit in permits:
        permit.ended(1010)
    error = refusal(lambda: admission.admit(limited, [Cost(10, 8000)]))
    assert 40 < error.retry_after_s < 60, "4,100 that it owes, and what it wants"
    clock.now_s += error.retry_after_s
    admission.admit(limited, [Cost(10, 8000)])


def test_what_comes_to_nothing_teaches_nothing() -> None:
    admission = make()
    limited = replace(BATCH, tokens_per_minute=1000)
    for _ in range(50):
        admission.admit(limited, [Cost(10, 8000)])[0].ended(0)
    admission.admit(limited, [Cost(900, 0)])
    error = refusal(lambda: admission.admit(limited, [Cost(10, 8000)]))
    assert "expected to take 266 tokens" in error.message


def test_calls_per_minute() -> None:
    clock = Clock()
    admission = make(clock)
    limited = replace(BATCH, requests_per_minute=2)
    for _ in range(2):
        admission.admit(limited, [Cost(1, 1), Cost(1, 1)])
    error = refusal(lambda: admission.admit(limited, [Cost(1, 1)]))
    assert error.retry_after_s == pytest.approx(30)
    clock.now_s += error.retry_after_s
    admission.admit(limited, [Cost(1, 1)])


def test_a_new_quota_holds_from_the_next_call_on() -> None:
    admission = make()
    admission.admit(replace(BATCH, tokens_per_minute=1000), [Cost(10, 0)])
    lower = replace(BATCH, tokens_per_minute=5)
    admission.admit(lower, [Cost(5, 0)])
    refusal(lambda: admission.admit(lower, [Cost(1, 0)]))
    admission.admit(replace(BATCH, tokens_per_minute=None), [Cost(10**5, 0)])


def test_retry_after_follows_how_fast_answers_end() -> None:
    clock = Clock()
    admission = make(clock, max_in_engine=40)
    running = [admission.admit(BATCH, [Cost(1, 1)])[0] for _ in range(40)]
    assert refusal(lambda: admission.admit(BATCH, [Cost(1, 1)])).retry_after_s == 1
    for _ in range(20):  # two a second
        clock.now_s += 0.5
        running.pop().ended(2)
        running += admission.admit(BATCH, [Cost(1, 1)])
    error = refusal(lambda: admission.admit(BATCH, [Cost(1, 1)] * 20))
    assert error.retry_after_s == pytest.approx(10, rel=0.1)
    clock.now_s += 3600  # nothing has ended for an hour
    assert refusal(lambda: admission.admit(BATCH, [Cost(1, 1)])).retry_after_s == 60


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(0, 2)),
        st.tuples(st.just("leave"), st.integers(0, 30)),
        st.tuples(
            st.just("admit"),
            st.integers(0, 2),
            st.lists(
                st.builds(Cost, st.integers(1, 80), st.integers(1, 40), st.integers(1, 4)),
                min_size=1,
                max_size=3,
            ),
        ),
        st.tuples(st.just("begun"), st.integers(0, 30)),
        st.tuples(st.just("ended"), st.integers(0, 30), st.integers(0, 400)),
        st.tuples(st.just("wait"), st.floats(0, 100)),
    ),
    max_size=60,
)
CALLERS = (
    ANONYMOUS,
    replace(BATCH, name="a", max_concurrent=2, tokens_per_minute=300),
    replace(BATCH, name="b", requests_per_minute=5),
)


@settings(deadline=None, max_examples=200)
@given(STEPS)
def test_counts_never_pass_their_limits_and_all_come_back(steps: list[Any]) -> None:
    clock = Clock()
    admission = make(clock, max_in_flight=4, max_in_engine=6, max_queued_tokens=150)
    permits: list[InFlightPermit] = []
    tickets: list[EnginePermit] = []
    waits: list[float] = []
    for name, *arguments in steps:
        try:
            if name == "enter":
                permits.append(admission.enter(CALLERS[arguments[0]]))
            elif name == "admit":
                alone = admission.running == 0
                tickets += admission.admit(CALLERS[arguments[0]], arguments[1])
                assert alone or admission.running <= 6
            elif name == "wait":
                clock.now_s += arguments[0]
            elif name == "leave" and permits:
                permits[arguments[0] % len(permits)].leave()
            elif name == "begun" and tickets:
                tickets[arguments[0] % len(tickets)].begun()
            elif name == "ended" and tickets:
                tickets[arguments[0] % len(tickets)].ended(arguments[1])
        except Overloaded as error:
            waits.append(error.retry_after_s)
        assert 0 <= admission.in_flight <= 4
        assert admission.waiting >= 0
        assert admission.queued_tokens >= 0
    assert all(0 < wait_s < math.inf for wait_s in waits)
    for held in permits:
        held.leave()
    for ticket in tickets:
        ticket.ended(0)
    counts = (
        admission.in_flight, admission.running, admission.waiting, admission.queued_tokens,
    )  # fmt: skip
    assert counts == (0, 0, 0, 0)
    clock.now_s += 24 * 3600
    for caller in CALLERS:  # every quota is whole again, and every key has its concurrency
        held = [admission.enter(caller) for _ in range(caller.max_concurrent or 4)]
        admission.admit(caller, [Cost(100, 200)])[0].ended(300)
        for place in held:
            place.leave()
