"""When an engine counts as hung: its clocks, with an engine that is only a process that sleeps."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packhorse.serve.engines.vllm import health, loras
from packhorse.serve.engines.vllm.health import Health, Heartbeat
from packhorse.serve.engines.vllm.patches.engine_watch import EngineWatch
from packhorse.serve.errors import EngineDied, EngineHung, Invalid
from packhorse.serve.messages import AdapterVersion
from packhorse.serve.settings.engine import EngineSettings


class Engine:
    """What EngineWatch and Health see of AsyncLLM, and the clock."""

    def __init__(self, pid: int) -> None:
        self.now_s = 0.0
        self.waiting = False
        self.cpu_s = 0.0  # since the last look
        self.scans = 0
        self.heartbeat = Heartbeat()
        manager = SimpleNamespace(processes=[SimpleNamespace(pid=pid)])
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: self.waiting)
        self.engine_core = SimpleNamespace(
            resources=SimpleNamespace(engine_manager=manager), utility_results={}
        )

    def since_last_look(self, *, with_helpers: bool) -> float:
        self.scans += with_helpers
        return self.cpu_s

    def looks(self, count: int, every_s: float = 0.5) -> None:
        for _ in range(count):
            self.now_s += every_s
            self.health.look()

    health: Health


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        found = Engine(process.pid)
        monkeypatch.setattr(health, "Activity", lambda _: found)
        monkeypatch.setattr(health.time, "monotonic", lambda: found.now_s)
        settings = EngineSettings.model_validate({"stall_timeout_s": 5, "step_timeout_s": 60})
        llm: Any = found
        found.health = Health(EngineWatch(llm), found.heartbeat, settings)
        yield found
        process.kill()


def test_no_work_no_hang(engine: Engine) -> None:
    engine.looks(1000)


def test_work_and_nothing_done(engine: Engine) -> None:
    engine.waiting = True
    engine.looks(10)
    with pytest.raises(EngineHung, match="done nothing for 6 s"):
        engine.looks(1)


def test_a_question_without_reply(engine: Engine) -> None:
    engine.engine_core.utility_results[1] = object()
    with pytest.raises(EngineHung, match="done nothing"):
        engine.looks(11)


def test_all_processes_are_looked_at_only_while_no_step_ends(engine: Engine) -> None:
    """It takes milliseconds, which a server that serves, or has nothing to do, must not pay."""
    engine.looks(100)
    engine.waiting = True
    for _ in range(100):
        engine.heartbeat.step()
        engine.looks(1)
    assert engine.scans == 0
    engine.looks(5)
    assert engine.scans == 5


def test_steps_and_cpu_are_progress(engine: Engine) -> None:
    engine.waiting = True
    for _ in range(100):
        engine.looks(9)
        engine.heartbeat.step()
    engine.cpu_s = 0.4
    engine.looks(100)


def test_a_step_that_never_ends(engine: Engine) -> None:
    engine.waiting, engine.cpu_s = True, 0.4
    with pytest.raises(EngineHung, match="at one step for 60 s"):
        engine.looks(121)


def test_clients_that_leave_do_not_hide_it(engine: Engine) -> None:
    engine.cpu_s = 0.4
    for _ in range(3):
        engine.waiting = True
        engine.looks(39)
        engine.waiting = False
        engine.looks(10)
    engine.waiting = True
    with pytest.raises(EngineHung, match="at one step"):
        engine.looks(4)


def test_a_machine_that_stood_still_is_no_hang(engine: Engine) -> None:
    engine.waiting = True
    engine.looks(3, every_s=17)


class Dying:
    """AsyncLLM whose calls fail, and whose death is known a little later; or never."""

    def __init__(self, after_looks: int) -> None:
        self._looks = after_looks

    @property
    def errored(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    async def add_lora(self, request: object) -> None:
        raise Exception("the worker is gone")  # as vLLM raises what the core says


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "DEATH_LOOK_S", 0.001)


@pytest.mark.usefixtures("_quick")
async def test_a_death_is_known_a_little_after_it_fails_calls() -> None:
    dying: Any = Dying(after_looks=5)
    assert await health.has_died(dying)
    alive: Any = Dying(after_looks=1000)
    assert not await health.has_died(alive)


@pytest.mark.usefixtures("_quick")
async def test_an_adapter_that_a_dying_engine_did_not_take() -> None:
    adapter = AdapterVersion("clinic", "0" * 64, Path("/x"), 1, 8)
    dying: Any = Dying(after_looks=5)
    with pytest.raises(EngineDied):
        await loras.Loras(dying, {}).load(adapter)
    alive: Any = Dying(after_looks=1000)
    with pytest.raises(Invalid, match="the worker is gone"):
        await loras.Loras(alive, {}).load(adapter)
