"""What vLLM's own series say beside ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from packhorse.serve.engines.vllm.patches.lasting_metrics import (
    _AdapterInfo,
    _Engine,
    _ModelSeries,
)
from packhorse.serve.metrics import ModelMetrics


def test_adapters_in_the_queue_before_the_engine_are_waited_for() -> None:
    """vLLM knows only of requests that it was given."""
    loaded: dict[int, Any] = {
        1: SimpleNamespace(lora_name="clinic@0123"),
        2: SimpleNamespace(lora_name="code@4567"),
    }
    metrics = ModelMetrics("demo")
    info = _AdapterInfo("demo", 4, _ModelSeries(_Engine(metrics, loaded, lambda: None)))
    waiting = {"clinic@0123": 2, "code@4567": 0}
    info.step(SimpleNamespace(waiting_lora_adapters=waiting, running_lora_adapters={}))
    queued = metrics.adapter_waiting.labels("ledger")
    queued.set(3)

    def named() -> tuple[str, str]:
        (family,) = info.collect()
        labels = family.samples[0].labels
        assert labels["model_name"] == "demo"
        return labels["waiting_lora_adapters"], labels["running_lora_adapters"]

    assert named() == ("clinic,ledger", "clinic,code")
    queued.set(0)
    assert named() == ("clinic", "clinic,code")
    info.forget()
    assert named() == ("", "clinic,code")
