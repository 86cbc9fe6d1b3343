"""When an engine is built again, and after which pause."""

from __future__ import annotations

from packhorse.serve.engines.restart_policy import RestartPolicy
from packhorse.serve.settings.supervisor import SupervisorSettings


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def restarts(clock: Clock | None = None, **settings: float) -> RestartPolicy:
    chosen = {"max_restarts": 2, "restart_window_s": 600, "backoff_s": 1, **settings}
    return RestartPolicy(SupervisorSettings.model_validate(chosen), clock or Clock())


def test_pauses_double_and_the_limit_ends_it() -> None:
    counted = restarts(max_restarts=9)
    pauses = []
    for engine in range(1, 10):
        counted.failed(engine)
        pauses.append(counted.pause_s)
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert not counted.are_over
    counted.failed(None)
    assert counted.are_over
    assert counted.count == 10


def test_old_failures_are_forgotten() -> None:
    clock = Clock()
    counted = restarts(clock)
    for _ in range(4):
        counted.failed(None)
        clock.now_s += 301
    assert counted.count == 1
    assert not counted.are_over


def test_deaths_of_poison_count_once_until_somebody_was_answered() -> None:
    counted = restarts()
    counted.failed(1)
    counted.forgive({1, 2})
    counted.failed(2)  # noticed after the poison was found
    assert counted.count == 1
    counted.answered()
    assert counted.count == 0
    counted.failed(3)
    assert (counted.count, counted.pause_s) == (1, 0)


def test_poison_without_an_answer_between_ends_it() -> None:
    counted = restarts()
    for engine in range(2, 4):
        counted.forgive({1, engine})
        counted.failed(engine)
        assert not counted.are_over
    counted.forgive({1, 4})
    assert counted.are_over


def test_a_rebuild_that_failed_is_nobodys_fault() -> None:
    counted = restarts()
    counted.failed(1)
    counted.failed(None)
    counted.forgive({1})
    assert counted.count == 2
