"""Adapters beyond the slots of a batch, which get them for a few steps each."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from packhorse.serve.engines.vllm.patches.lora_time_slicing import TimeSlices


def test_all_are_in_every_step_while_there_are_slots() -> None:
    slices = TimeSlices(2, steps=4)
    for working in ([7], [7, 8], [8], [8, 9]) * 3:
        assert slices.of_step(working) == set(working)


def test_a_newcomer_gets_the_slot_of_who_had_it_longest() -> None:
    slices = TimeSlices(2, steps=4)
    slices.of_step([1])
    for _ in range(6):
        assert slices.of_step([1, 2]) == {1, 2}
    assert slices.of_step([1, 2, 3]) == {2, 3}
    for _ in range(3):  # 2 has had its slot for long too
        assert slices.of_step([1, 2, 3]) == {3, 1}


def test_a_slot_is_kept_for_its_steps() -> None:
    slices = TimeSlices(1, steps=4)
    seen = [next(iter(slices.of_step([1, 2, 3]))) for _ in range(16)]
    assert seen == [1] * 4 + [2] * 4 + [3] * 4 + [1] * 4


def test_who_is_done_leaves_its_slot_at_once() -> None:
    slices = TimeSlices(1, steps=100)
    assert slices.of_step([1, 2]) == {1}
    assert slices.of_step([2]) == {2}
    assert slices.of_step([1, 2]) == {2}


@given(
    slots=st.integers(1, 4),
    steps=st.integers(1, 5),
    adapters=st.integers(1, 9),
)
def test_everybody_has_an_equal_share(slots: int, steps: int, adapters: int) -> None:
    slices = TimeSlices(slots, steps)
    had: Counter[int] = Counter()
    rounds = steps * adapters * 20
    for _ in range(rounds):
        inside = slices.of_step(range(adapters))
        assert len(inside) == min(slots, adapters)
        had.update(inside)
    fair = rounds * min(slots, adapters) / adapters
    assert all(abs(had[adapter] - fair) <= 2 * steps for adapter in range(adapters))


@given(st.lists(st.sets(st.integers(1, 6)), max_size=60), st.integers(1, 3), st.integers(1, 4))
def test_only_who_works_is_inside_and_no_slot_is_left_empty(
    days: list[set[int]], slots: int, steps: int
) -> None:
    slices = TimeSlices(slots, steps)
    for working in days:
        inside = slices.of_step(sorted(working))
        assert inside <= working
        assert len(inside) == min(slots, len(working))
