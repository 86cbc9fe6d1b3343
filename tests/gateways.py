"""What routers of several servers read of one: their rules in our words, from their sources (which
docs/gateways.md names). Text of /metrics in, what the router then believes out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass
class Picker:
    """What an endpoint picker, llm-d's or the Gateway API Inference Extension's, knows of a pod."""

    waiting: int
    running: int
    kv_cache_usage: float
    adapters: set[str] = field(default_factory=set)
    adapters_waiting: set[str] = field(default_factory=set)
    max_adapters: int = 0
    block_size: int = 0
    blocks: int = 0


def llm_d(text: str) -> Picker:
    """Of each family the first series, since none has a timestamp. A family that is not there is an
    error, but for the adapters' one.
    """
    families = _families(text)

    def first(name: str) -> Sample:
        return families[name][0]

    picker = Picker(
        waiting=int(first("vllm:num_requests_waiting").value),
        running=int(first("vllm:num_requests_running").value),
        kv_cache_usage=first("vllm:kv_cache_usage_perc").value,
        block_size=int(first("vllm:cache_config_info").labels["block_size"]),
        blocks=int(first("vllm:cache_config_info").labels["num_gpu_blocks"]),
    )
    for sample in families.get("vllm:lora_requests_info", ())[:1]:
        _read_adapters(picker, sample)
    return picker


def inference_extension(text: str, usage: str = "vllm:gpu_cache_usage_perc") -> Picker:
    """The same, but the adapters' series with the largest value, of those that name an adapter."""
    families = _families(text)
    picker = Picker(
        waiting=int(families["vllm:num_requests_waiting"][0].value),
        running=int(families["vllm:num_requests_running"][0].value),
        kv_cache_usage=families[usage][0].value,
    )
    named = [
        sample
        for sample in families.get("vllm:lora_requests_info", ())
        if sample.labels["running_lora_adapters"] or sample.labels["waiting_lora_adapters"]
    ]
    if named:
        _read_adapters(picker, max(named, key=lambda sample: sample.value))
    return picker


def _read_adapters(picker: Picker, sample: Sample) -> None:
    picker.adapters = _names(sample.labels["running_lora_adapters"])
    picker.adapters_waiting = _names(sample.labels["waiting_lora_adapters"])
    picker.max_adapters = int(sample.labels["max_lora"])


def _names(joined: str) -> set[str]:
    return {name.strip() for name in joined.split(",")} - {""}


@dataclass
class EngineStats:
    """What production-stack's router knows of an engine."""

    running: float = 0
    waiting: float = 0
    kv_cache_usage: float = 0.0
    prefix_hits: float = 0
    prefix_queries: float = 0


def production_stack(text: str) -> EngineStats:
    """Of each name the last sample; what is not there is 0, without an error."""
    stats = EngineStats()
    fields = {
        "vllm:num_requests_running": "running",
        "vllm:num_requests_waiting": "waiting",
        "vllm:gpu_cache_usage_perc": "kv_cache_usage",
        "vllm:gpu_prefix_cache_hits_total": "prefix_hits",
        "vllm:gpu_prefix_cache_queries_total": "prefix_queries",
    }
    for samples in _families(text).values():
        for sample in samples:
            if sample.name in fields:
                setattr(stats, fields[sample.name], sample.value)
    return stats


def models(listed: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """/v1/models as both read it: base models, and the adapters of each."""
    adapters: dict[str, list[str]] = {}
    bases = []
    for card in listed["data"]:
        if card.get("parent"):
            adapters.setdefault(card["parent"], []).append(card["id"])
        else:
            bases.append(card["id"])
    return bases, adapters


def _families(text: str) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        found[family.name] = _plain(family.samples)
    return found


def _plain(samples: Iterable[Sample]) -> list[Sample]:
    """Without timestamps, which would change what is the latest: there must be none."""
    listed = list(samples)
    assert all(sample.timestamp is None for sample in listed)
    return listed
