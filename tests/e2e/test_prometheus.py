"""A real Prometheus beside a real engine: every name that dashboard, alerts and routers use is
there, and every panel has data after some requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests import gateways
from tests.client import CHAT
from tests.conftest import Server
from tests.deploy import promql
from tests.deploy.scraping import Prometheus, needs_prometheus, running_prometheus, wait_until
from tests.deploy.test_dashboard import DASHBOARD, panels, plain, problems
from tests.deploy.test_prometheus import alerts

# Of servers with adapters alone; read from one in tests/e2e/test_adapters.py.
WITH_ADAPTERS = {"vllm:lora_requests_info"}
# Panels of what this server does not have or do: adapters, and refusals (a counter's labels come
# with the first of its kind).
EMPTY = {"Routes", "Adapter queue", "Refusals"}


def use(server: Server) -> None:
    """Answers, streams, hits, and requests that are refused."""

    def ask(number: int) -> int:
        body: dict[str, Any] = {"model": server.model, "max_tokens": 16, "ignore_eos": True}
        body["messages"] = [{"role": "user", "content": f"Tell me of the number {number % 6}."}]
        body |= {"temperature": 0} if number % 2 else {"stream": True}
        body |= {"top_k": -7} if number % 8 == 7 else {}
        return httpx.post(server.url + CHAT, json=body, timeout=120).status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(24))) == {200, 400}


@pytest.fixture(scope="module")
def page(int8_server: Server) -> str:
    use(int8_server)
    return httpx.get(int8_server.url + "/metrics", timeout=30).text


@pytest.fixture(scope="module")
def prometheus(
    int8_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    target = int8_server.url.removeprefix("http://")
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), target) as running:
        running.wait_for("up == 1")
        use(int8_server)  # a rate is what happens between two scrapes
        yield running


def live(page: str) -> promql.Known:
    """What this server exports, labels of ours as declared: without a case there is no series."""
    exported = promql.exported(page)
    ours = {name: family for name, family in promql.declared().items() if name in exported}
    theirs = {name: family for name, family in exported.items() if name.startswith("vllm:")}
    return {**promql.samples_of(ours, theirs), **promql.OF_PROMETHEUS}


def test_vllms_metrics_are_as_recorded(page: str) -> None:
    """When this fails, vLLM has changed: look what dashboard, alerts and docs/gateways.md use of
    it, and write what the message shows into tests/deploy/vllm_metrics.txt.
    """
    exported = promql.exported(page)
    now = {name: family for name, family in exported.items() if name.startswith("vllm:")}
    before = {n: family for n, family in promql.recorded().items() if n not in WITH_ADAPTERS}
    lines = [
        f"{name} {family.kind} {','.join(sorted(family.labels)) or '-'}"
        for name, family in sorted(now.items())
    ]
    assert now == before, "\n".join(lines)


def test_all_of_ours_is_exported(page: str) -> None:
    """Only a machine with a GPU has the GPU's."""
    missing = set(promql.declared()) - set(promql.exported(page))
    assert {name for name in missing if not name.startswith("packhorse_gpu_")} == set()


def test_dashboard_and_alerts_name_only_what_this_server_exports(page: str) -> None:
    here = live(page)
    absent = set(promql.known()) - set(here)
    assert {n for n in absent if not n.startswith("packhorse_gpu_")} <= WITH_ADAPTERS
    with_gpu = {**{name: promql.known()[name] for name in absent - WITH_ADAPTERS}, **here}
    assert problems(DASHBOARD, with_gpu) == []
    assert [text for alert in alerts() for text in promql.problems(alert["expr"], here)] == []


def test_routers_read_this_server(page: str, int8_server: Server) -> None:
    picker, older = gateways.llm_d(page), gateways.inference_extension(page)
    stats = gateways.production_stack(page)
    assert (picker.waiting, older.waiting, stats.waiting) == (0, 0, 0)
    assert picker.kv_cache_usage == older.kv_cache_usage == stats.kv_cache_usage
    assert 0 <= picker.kv_cache_usage <= 1
    assert picker.block_size > 0
    assert picker.blocks > 0
    assert stats.prefix_queries > 0
    listed = httpx.get(int8_server.url + "/v1/models", timeout=30).json()
    assert gateways.models(listed) == ([int8_server.model], {})


@needs_prometheus
def test_every_panel_has_data(prometheus: Prometheus) -> None:
    def empty() -> set[str]:
        return {
            panel["title"]
            for panel in panels()
            if not any(
                math.isfinite(value)
                for target in panel["targets"]
                for _, value in prometheus.query(plain(target["expr"]))
            )
        }

    folded = {panel["title"] for row in DASHBOARD["panels"] for panel in row.get("panels", ())}
    wait_until(lambda: empty() - folded <= EMPTY, "every panel has data", timeout_s=60)


@needs_prometheus
def test_no_alert_fires_for_a_server_that_is_well(prometheus: Prometheus) -> None:
    def unknown() -> bool:
        groups = prometheus.ask("rules")["groups"]
        return any(rule["health"] == "unknown" for group in groups for rule in group["rules"])

    wait_until(lambda: not unknown(), "all rules evaluated")
    groups = prometheus.ask("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    # A test machine may well be slow.
    slow = {"PackhorseEventLoopStalled"}
    firing = prometheus.query('ALERTS{alertstate="firing"}')
    assert {labels["alertname"] for labels, _ in firing} <= slow
