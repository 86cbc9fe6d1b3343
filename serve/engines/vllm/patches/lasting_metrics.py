"""vLLM's own statistics, made to outlive the engine they are of; and its heartbeat.

vLLM unregisters all of its collectors whenever an engine is made, so its counters would restart at
0 with each rebuild. Here the collectors of the first engine serve all that follow it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from packhorse.serve import metrics
from prometheus_client import REGISTRY, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import PrometheusStatLogger


class LastingStats(PrometheusStatLogger):
    """Give the class to AsyncLLM, which makes the instance. `steps` counts those of its engine."""

    _first: ClassVar[dict[str, Any] | None] = None

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        first = LastingStats._first
        if first is None:
            super().__init__(vllm_config, engine_indexes)
            for gauge in self.gauge_scheduler_waiting.values():
                _add_what_is_held(gauge)
            REGISTRY.register(_OldNames(self))
            self.adapters: _AdapterInfo | None = None
            theirs: Any = vars(self)["gauge_lora_info"]
            self.gauge_lora_info = None
            if theirs is not None:  # it never drops what it once named
                REGISTRY.unregister(theirs)
                self.adapters = _AdapterInfo(self.max_lora)
                REGISTRY.register(self.adapters)
            LastingStats._first = dict(self.__dict__)
        else:
            self.__dict__.update(first)
            # What the last engine was doing is over.
            for gauges in (
                self.gauge_scheduler_running,
                self.gauge_scheduler_waiting,
                self.gauge_kv_cache_usage,
            ):
                for gauge in gauges.values():
                    gauge.set(0)
            if self.adapters is not None:
                self.adapters.forget()
        self._announced = first is not None
        self.steps = 0

    def record(self, scheduler_stats: Any, *stats: Any, **named: Any) -> None:
        self.steps += 1
        super().record(scheduler_stats, *stats, **named)
        if self.adapters is not None and scheduler_stats is not None:
            self.adapters.step(scheduler_stats)

    def log_engine_initialized(self) -> None:
        if not self._announced:
            super().log_engine_initialized()


class _AdapterInfo(Collector):
    """`vllm:lora_requests_info`, which routers of several servers read: under the names that
    clients use, with those that are loaded and idle too, and nothing else.
    """

    def __init__(self, max_loras: int) -> None:
        self._max_loras = max_loras
        self._waiting: dict[str, int] = {}
        self.loaded: Mapping[int, LoRARequest] = {}

    def forget(self) -> None:
        """The engine has gone, and with it what it had waiting."""
        self._waiting = {}

    def step(self, stats: Any) -> None:
        """Look at vLLM's own figures of one step."""
        self._waiting = stats.waiting_lora_adapters
        metrics.STEP_ADAPTERS.observe(sum(map(bool, stats.running_lora_adapters.values())))

    def collect(self) -> Iterator[Metric]:
        waiting = {name for name, count in self._waiting.items() if count}
        waiting.update(metrics.adapters_waiting())  # for their turn, before vLLM knows of them
        found = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that are loaded (running_lora_adapters), and those waited for.",
            labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )
        resident = [lora.lora_name for lora in list(self.loaded.values())]  # of another thread
        labels = [str(self._max_loras), _public(waiting), _public(resident)]
        found.add_metric(labels, time.time())
        yield found


class _OldNames(Collector):
    """Series under names that vLLM has given up, and that production-stack still reads."""

    def __init__(self, stats: PrometheusStatLogger) -> None:
        self._kv_cache = stats.gauge_kv_cache_usage
        self._counters = {
            "vllm:gpu_prefix_cache_queries": stats.counter_prefix_cache_queries,
            "vllm:gpu_prefix_cache_hits": stats.counter_prefix_cache_hits,
        }

    def collect(self) -> Iterator[Metric]:
        usage = GaugeMetricFamily(
            "vllm:gpu_cache_usage_perc",
            "Old name of vllm:kv_cache_usage_perc.",
            labels=("model_name", "engine"),
        )
        for gauge in self._kv_cache.values():
            usage.add_metric(gauge._labelvalues, gauge._value.get())
        yield usage
        for name, counters in self._counters.items():
            new = name.replace("gpu_", "")
            family = CounterMetricFamily(
                name, f"Old name of {new}.", labels=("model_name", "engine")
            )
            for counter in counters.values():
                family.add_metric(counter._labelvalues, counter._value.get())
            yield family


def show_adapters(llm: AsyncLLM, loaded: Mapping[int, LoRARequest]) -> None:
    """Export what this engine has loaded, from now on."""
    for found in llm.logger_manager.stat_loggers if llm.logger_manager else ():
        if isinstance(found, LastingStats) and found.adapters is not None:
            found.adapters.loaded = loaded


def _public(engine_names: Iterable[str]) -> str:
    return ",".join(sorted({name.partition("@")[0] for name in engine_names}))


def _add_what_is_held(gauge: Gauge) -> None:
    """A request that we hold back waits too, to who scales by this gauge."""
    own = gauge._value
    gauge.set_function(lambda: own.get() + metrics.held())
