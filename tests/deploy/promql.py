"""What is wrong with a PromQL expression: it does not parse, or it asks for a metric, a label or a
label's value that no server exports. promtool has the last word on syntax, but knows no names.

Called by the tests of deploy/, and by tests/e2e/test_prometheus.py with what a real engine exports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from packhorse.serve.errors import ErrorKind
from packhorse.serve.metrics import ModelMetrics, ServerMetrics

VLLM_METRICS = Path(__file__).parent / "vllm_metrics.txt"

# Prometheus gives these to every series.
TARGET_LABELS = frozenset({"job", "instance"})
OF_PROMETHEUS = {"up": frozenset[str]()}

# Labels whose values are a closed set that expressions name.
VALUES = {
    ("packhorse_requests_total", "outcome"): {"ok", *map(str, ErrorKind)},
    ("packhorse_tokens_total", "direction"): {"prompt", "completion"},
    ("packhorse_cache_lookups_total", "outcome"): {"hit", "miss", "old", "damaged", "failed"},
    ("packhorse_host_cpu_seconds_total", "mode"): {"busy", "idle"},
    ("packhorse_host_memory_bytes", "kind"): {"total", "available"},
    ("packhorse_gpu_memory_bytes", "kind"): {"total", "used"},
}

Known = Mapping[str, frozenset[str]]
"""Names of samples, and the labels of each."""


@dataclass(frozen=True)
class Family:
    """A metric as it is exported, under the name of its TYPE line."""

    name: str
    kind: str
    labels: frozenset[str]

    def samples(self) -> Iterator[tuple[str, frozenset[str]]]:
        if self.kind == "histogram":
            yield self.name + "_bucket", self.labels | {"le"}
            yield self.name + "_sum", self.labels
            yield self.name + "_count", self.labels
        else:
            yield self.name, self.labels


def exported(text: str) -> dict[str, Family]:
    """The families of a /metrics page. When each counter was made is left out."""
    found = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        if not name.endswith("_created"):
            found[name] = Family(name, family.type, frozenset(labels))
    return found


def recorded() -> dict[str, Family]:
    """vLLM's families, as tests/e2e/test_prometheus.py has seen them last."""
    lines = [line.split() for line in VLLM_METRICS.read_text().splitlines() if line[:1] != "#"]
    return {
        name: Family(name, kind, frozenset(labels.split(",") if labels != "-" else ()))
        for name, kind, labels in lines
    }


def declared() -> dict[str, Family]:
    """Ours, with series or without. The label `model` comes with the scrape."""
    server = ServerMetrics()
    server.watch_machine()
    found = {
        **_declared_in(server.registry, frozenset()),
        **_declared_in(ModelMetrics().registry, frozenset({"model"})),
    }
    assert {"packhorse_ready", "packhorse_requests_total"} <= found.keys()
    return found


def _declared_in(registry: CollectorRegistry, common: frozenset[str]) -> dict[str, Family]:
    found = {}
    for owner in registry._collector_to_names:
        for family in owner.describe():
            name = family.name + ("_total" if family.type == "counter" else "")
            # A metric keeps its labels itself, a collector's families keep theirs.
            labels = getattr(owner, "_labelnames", None) or getattr(family, "_labelnames", ())
            found[name] = Family(name, family.type, frozenset(labels) | common)
    return found


def samples_of(*families: Mapping[str, Family]) -> dict[str, frozenset[str]]:
    every = [family for mapping in families for family in mapping.values()]
    return dict(sample for family in every for sample in family.samples())


def known() -> Known:
    """All that a server with adapters and a GPU exports, and what Prometheus adds."""
    return {**samples_of(declared(), recorded()), **OF_PROMETHEUS}


def problems(expression: str, known: Known) -> list[str]:
    """What is wrong with it, in words; nothing when it is right."""
    try:
        tree = promql_parser.parse(expression)
    except ValueError as error:
        return [f"does not parse: {error}"]
    found: list[str] = []
    _look_at(tree, known, found)
    return found


def metric_names(expression: str) -> set[str]:
    """The samples that it asks for."""
    return {selector.name or "" for selector in _selectors(promql_parser.parse(expression))}


def _look_at(tree: Any, known: Known, found: list[str]) -> None:
    for selector in _selectors(tree):
        labels = known.get(selector.name or "")
        if labels is None:
            found.append(f"no server exports {selector.name}")
            continue
        for matcher in selector.matchers.matchers:
            if matcher.name not in labels | TARGET_LABELS:
                found.append(f"{selector.name} has no label {matcher.name}")
            allowed = VALUES.get((selector.name, matcher.name))
            named = set(re.split(r"\|", matcher.value))
            if allowed is not None and not named <= allowed:
                found.append(f"{selector.name} has no {matcher.name}={sorted(named - allowed)}")
    for node in _nodes(tree):
        modifier = getattr(node, "modifier", None)
        grouping = [] if modifier is None else _grouping(modifier)
        below = frozenset[str]().union(*(known.get(s.name or "", ()) for s in _selectors(node)))
        found += [
            f"nothing within {node} has the label {label}"
            for label in grouping
            if label not in below | TARGET_LABELS
        ]


def _grouping(modifier: Any) -> list[str]:
    """Labels of `by`, `without`, `on` and `ignoring`."""
    if isinstance(modifier, promql_parser.AggModifier):
        return list(modifier.labels)
    matching = modifier.matching
    return list(matching.labels) if matching is not None else []


def _selectors(tree: Any) -> list[Any]:
    return [node for node in _nodes(tree) if isinstance(node, promql_parser.VectorSelector)]


def _nodes(tree: Any) -> list[Any]:
    nodes: list[Any] = []
    promql_parser.walk(tree, nodes.append)
    return nodes
