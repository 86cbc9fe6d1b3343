"""vLLM's own `vllm:*` series, which outlive the engine that they are of and are kept apart by
model.

vLLM unregisters all of its collectors whenever an engine is made. So its counters restart at 0 with
each rebuild, and of two engines in one process the first loses its series. Here the collectors of a
model (`model_name`) are made with its first engine, in a registry of their own, and serve all
engines of that model that follow. One collector in Prometheus' global registry shows all models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.v1.metrics.loggers import PrometheusStatLogger

from packhorse.serve.engines.vllm.patches import probing
from packhorse.serve.metrics import ModelMetrics

NAME = "lasting_metrics"
KIND = "speed"
APPLIES_TO = {
    "vllm.v1.metrics.loggers": {
        "PrometheusStatLogger.__init__": "sha256:75c9e86a2fa731a1",
        "PrometheusStatLogger.record": (
            "call(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)"
        ),
        "PrometheusStatLogger.log_engine_initialized": "call()",
        "PrometheusStatLogger.log_metrics_info": "names: _gauge_cls",
        "StatLoggerManager.__init__": "sha256:3c35cc4d98c56b53",
    },
    "vllm.v1.metrics.prometheus": {
        "unregister_vllm_metrics": "sha256:ae96c14bd55c82f4",
    },
    "vllm.v1.metrics.stats": {
        "SchedulerStats": "names: waiting_lora_adapters running_lora_adapters",
    },
}
WITHOUT = "vLLM's own series restart at 0 with each rebuild, and are of one engine of a process."

METRICS = {"_gauge_cls": Gauge, "_counter_cls": Counter, "_histogram_cls": Histogram}
PARTS = ("_spec_decoding_cls", "_kv_connector_cls", "_ec_connector_cls", "_perf_metrics_cls")


def probe(root: Path | None = None) -> str | None:
    return probing.reason(APPLIES_TO, root)


class _Engine(NamedTuple):
    """What the statistics of one engine go to, beside the series."""

    metrics: ModelMetrics
    loaded: Mapping[int, LoRARequest]
    on_step: Callable[[], None]


def stat_logger(
    metrics: ModelMetrics, loaded: Mapping[int, LoRARequest], on_step: Callable[[], None]
) -> type[LastingStats]:
    """The class to give to AsyncLLM, which makes its one instance, for one engine.

    `loaded` are the engine's adapters by number, looked at whenever somebody scrapes; `on_step` is
    called for each step of the engine.
    """
    return type("EngineStats", (LastingStats,), {"engine": _Engine(metrics, loaded, on_step)})


class LastingStats(PrometheusStatLogger):
    """See `stat_logger`."""

    engine: ClassVar[_Engine]

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        model = vllm_config.model_config.served_model_name
        with _lock:
            series = _models.get(model)
            if series is None:
                series = _ModelSeries(self.engine)
                self._make(series, vllm_config, engine_indexes)
                if not _models:
                    REGISTRY.register(_AllModels())
                _models[model] = series
                self._announced = False
            else:
                self.__dict__.update(series.attributes)
                self._announced = True
                series.begin(self.engine)
        self._series = series

    def _make(
        self, series: _ModelSeries, vllm_config: VllmConfig, engine_indexes: list[int] | None
    ) -> None:
        """vLLM's collectors, in the model's registry: it makes them of these classes."""
        registry = series.registry
        self.__dict__.update(
            {name: partial(kind, registry=registry) for name, kind in METRICS.items()}
        )
        for name in PARTS:
            setattr(self, name, _in_registry(getattr(self, name), registry))
        super().__init__(vllm_config, engine_indexes)
        theirs: Any = vars(self)["gauge_lora_info"]
        self.gauge_lora_info = None
        if theirs is not None:  # it never drops the adapters that it once named
            registry.unregister(theirs)
            model = str(vllm_config.model_config.served_model_name)
            series.adapters = _AdapterInfo(model, self.max_lora, series)
            registry.register(series.adapters)
        for gauge in list(self.gauge_scheduler_waiting.values())[:1]:
            _add_what_waits_here(gauge, series)
        registry.register(_OldNames(self))
        series.attributes = dict(self.__dict__)

    def record(self, scheduler_stats: Any, *stats: Any, **named: Any) -> None:
        self.engine.on_step()
        super().record(scheduler_stats, *stats, **named)
        if self._series.adapters is not None and scheduler_stats is not None:
            self._series.adapters.step(scheduler_stats)

    def log_engine_initialized(self) -> None:
        if not self._announced:
            super().log_engine_initialized()


class _ModelSeries:
    """The collectors of one model, and the engine of it that is there now."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.attributes: dict[str, Any] = {}
        """Of the first engine's LastingStats."""
        self.adapters: _AdapterInfo | None = None

    def begin(self, engine: _Engine) -> None:
        """Another engine: what the last one was doing is over."""
        self.engine = engine
        for name in ("gauge_scheduler_running", "gauge_scheduler_waiting", "gauge_kv_cache_usage"):
            for gauge in self.attributes[name].values():
                gauge.set(0)
        if self.adapters is not None:
            self.adapters.forget()


_models: dict[str, _ModelSeries] = {}
_lock = threading.Lock()


class _AllModels(Collector):
    """The series of all models, a family once."""

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for series in list(_models.values()):
            for family in series.registry.collect():
                if family.name in families:
                    families[family.name].samples += family.samples
                else:
                    families[family.name] = family
        yield from families.values()


def _in_registry(part: type, registry: CollectorRegistry) -> type:
    """A part of vLLM's statistics that makes its collectors in this registry."""
    makers = {
        name: staticmethod(partial(kind, registry=registry))
        for name, kind in METRICS.items()
        if hasattr(part, name)
    }
    return type(part.__name__, (part,), makers)


class _AdapterInfo(Collector):
    """`vllm:lora_requests_info`, which routers of several servers read: under the names that
    clients use, with the adapters that are loaded and idle too, and no others.
    """

    def __init__(self, model: str, max_loras: int, series: _ModelSeries) -> None:
        self._model = model
        self._max_loras = max_loras
        self._series = series
        self._waiting: dict[str, int] = {}

    def forget(self) -> None:
        """The engine has gone, and with it what it had waiting."""
        self._waiting = {}

    def step(self, stats: Any) -> None:
        """Look at vLLM's own figures of one step."""
        self._waiting = stats.waiting_lora_adapters
        active = sum(map(bool, stats.running_lora_adapters.values()))
        self._series.engine.metrics.active_loras_per_step.observe(active)

    def collect(self) -> Iterator[Metric]:
        engine = self._series.engine
        waiting = {name for name, count in self._waiting.items() if count}
        waiting.update(engine.metrics.adapters_waiting())  # in our queue, before vLLM's
        found = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that are loaded (running_lora_adapters), and those waited for.",
            labels=("model_name", "max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )
        resident = [lora.lora_name for lora in list(engine.loaded.values())]  # of another thread
        labels = [self._model, str(self._max_loras), _public(waiting), _public(resident)]
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


def _public(engine_names: Iterable[str]) -> str:
    return ",".join(sorted({name.partition("@")[0] for name in engine_names}))


def _add_what_waits_here(gauge: Gauge, series: _ModelSeries) -> None:
    """Requests that are held back in front of the engine wait too, for autoscalers that read this
    gauge; of several ranks, the first has them.
    """
    own = gauge._value
    gauge.set_function(lambda: own.get() + series.engine.metrics.requests_waiting_for_engine())
