"""Figures of processes, machine and GPUs, against what the system itself says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from packhorse.serve.telemetry.machine import Gpus, LoopLag, Machine


def values(collector: Collector) -> dict[tuple[str, ...], float]:
    """(sample, label values...) -> value."""
    found: dict[tuple[str, ...], float] = {}
    family: Metric
    for family in collector.collect():
        for sample in family.samples:
            found[sample.name, *sample.labels.values()] = sample.value
    return found


def test_the_servers_own_process() -> None:
    found = values(Machine())
    rss = psutil.Process().memory_info().rss
    assert found["packhorse_process_resident_bytes", "server"] == pytest.approx(rss, rel=0.2)
    assert found["packhorse_process_cpu_seconds_total", "server"] == pytest.approx(
        time.process_time(), abs=1
    )


def test_an_engines_seconds_outlive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packhorse.serve.telemetry.machine.SEARCH_EVERY_S", 0)
    machine = Machine()
    before = values(machine)["packhorse_process_cpu_seconds_total", "engine"]
    burn = "import time, sys\nwhile time.process_time() < 0.3: pass\nprint('.', flush=True)\n"
    code = burn + "sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running = values(machine)
        child.communicate()
    monkeypatch.setattr(
        "packhorse.serve.telemetry.machine.SEARCH_EVERY_S", 1000
    )  # that it is gone is seen at once
    gone = values(machine)
    resident = "packhorse_process_resident_bytes", "engine"
    assert gone[resident] < running[resident]
    used_s = running["packhorse_process_cpu_seconds_total", "engine"]
    assert used_s >= before + 0.25
    assert running["packhorse_process_resident_bytes", "engine"] > 2**20
    assert gone["packhorse_process_cpu_seconds_total", "engine"] >= used_s


def test_the_machine() -> None:
    found = values(Machine())
    memory = psutil.virtual_memory()
    assert found["packhorse_host_memory_bytes", "total"] == memory.total
    assert 0 < found["packhorse_host_memory_bytes", "available"] <= memory.total
    busy_s, idle_s = (found["packhorse_host_cpu_seconds_total", m] for m in ("busy", "idle"))
    cores = psutil.cpu_count() or 1
    up_s = (time.time() - psutil.boot_time()) * cores
    assert busy_s > 0
    assert busy_s + idle_s <= up_s * 1.1 + 10
    assert next(labels for name, *labels in found if name == "packhorse_build_info")[0]


class FakeNvml:
    """Two GPUs, of which the second does not answer any more. Contract: NVML's C names."""

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        if number == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return number

    def nvmlDeviceGetMemoryInfo(self, _: int) -> Any:
        return SimpleNamespace(total=80 * 2**30, used=20 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, _: int) -> Any:
        return SimpleNamespace(gpu=75, memory=10)

    def nvmlDeviceGetTemperature(self, _: int, sensor: int) -> int:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 61

    def nvmlDeviceGetPowerUsage(self, _: int) -> int:
        return 350_500


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    assert all(hasattr(pynvml, name) for name in dir(fake) if name.startswith(("nvml", "NVML")))
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    assert values(Gpus()) == {
        ("packhorse_gpu_utilization_ratio", "0"): 0.75,
        ("packhorse_gpu_memory_bytes", "0", "total"): 80 * 2**30,
        ("packhorse_gpu_memory_bytes", "0", "used"): 20 * 2**30,
        ("packhorse_gpu_power_watts", "0"): 350.5,
        ("packhorse_gpu_temperature_celsius", "0"): 61,
    }


def test_a_driver_that_lost_its_devices_takes_nothing_else_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Lost(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setitem(sys.modules, "pynvml", Lost())  # type: ignore[arg-type]
    assert values(Gpus()) == {}


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail() -> None:
        asked.append(1)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    gpus = Gpus()
    assert values(gpus) == {}
    assert values(gpus) == {}
    assert asked == [1]  # the library is looked for once


async def test_a_late_event_loop_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packhorse.serve.telemetry.machine.LOOK_EVERY_S", 0.01)
    lag = LoopLag()
    assert lag.worst() == 0
    task = asyncio.create_task(lag.watch())
    await asyncio.sleep(0.05)
    time.sleep(0.2)  # noqa: ASYNC251 what no one should do
    await asyncio.sleep(0.05)
    assert lag.worst() >= 0.15
    assert lag.worst() >= 0.15  # who else reads it sees it too
    task.cancel()


def test_the_worst_of_a_minute_is_forgotten_after_it() -> None:
    lag = LoopLag()
    for now_s, late_s in [(0, 1.0), (10, 3.0), (20, 2.0), (69, 0.1)]:
        lag.note(now_s, late_s)
    assert lag.worst() == 3.0
    lag.note(71, 0.2)
    assert lag.worst() == 2.0
    lag.note(200, 0.0)
    assert lag.worst() == 0.0
