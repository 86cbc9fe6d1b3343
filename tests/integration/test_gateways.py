"""Routers of several servers find here what docs/gateways.md promises, row by row. The echo engine
has no vllm:* metrics: their names are compared with those recorded of a real one, and read from a
real one in tests/e2e/test_prometheus.py.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from packhorse.serve.metrics import ModelMetrics
from tests import gateways
from tests.client import CHAT, TEXT
from tests.deploy.promql import recorded
from tests.integration.serving import bearer, serving, write_keys
from tests.integration.test_adapters import adapted

BOTH = ["vllm:num_requests_waiting", "vllm:num_requests_running"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gauge", [*BOTH, "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"]),
        ("counter", ["vllm:gpu_prefix_cache_hits_total", "vllm:gpu_prefix_cache_queries_total"]),
    ],
)
def test_metrics_have_the_names_and_types_that_are_read(kind: str, names: list[str]) -> None:
    """Without labels of which a server has several values: routers take the first series, or the
    last.
    """
    for name in names:
        family = recorded()[name]
        assert (family.kind, family.labels) == (kind, {"model_name", "engine"})


def test_metrics_have_the_labels_that_are_read() -> None:
    assert recorded()["vllm:lora_requests_info"].labels == {
        "max_lora", "running_lora_adapters", "waiting_lora_adapters",
    }  # fmt: skip
    assert {"block_size", "num_gpu_blocks"} <= recorded()["vllm:cache_config_info"].labels


def lora_info(**labels: str) -> str:
    """A page with as many series of vllm:lora_requests_info as there are values given."""
    series = "".join(
        f'vllm:lora_requests_info{{max_lora="4",running_lora_adapters="{running}",'
        f'waiting_lora_adapters=""}} {moment}\n'
        for moment, running in enumerate(labels.values(), start=1)
    )
    plain = "".join(
        f'# TYPE {name} gauge\n{name}{{engine="0",model_name="m"}} 1\n'
        for name in (*BOTH, "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
    )
    config = 'vllm:cache_config_info{block_size="128",num_gpu_blocks="64"} 1\n'
    return f"{plain}{config}# TYPE vllm:lora_requests_info gauge\n{series}"


def test_several_series_would_mislead_a_router() -> None:
    """Why ours is one series, where vLLM's own keeps all that ever were."""
    page = lora_info(before="old", now="new")
    assert gateways.llm_d(page).adapters == {"old"}
    assert gateways.inference_extension(page).adapters == {"new"}


def test_adapters_that_are_held_are_seen_by_every_router() -> None:
    from packhorse.serve.engines.vllm.patches.lasting_metrics import (
        _AdapterInfo,
        _Engine,
        _ModelSeries,
    )

    loaded: dict[int, Any] = {}
    engine = _Engine(ModelMetrics("m"), loaded, lambda: None)
    info = _AdapterInfo("m", 4, _ModelSeries(engine))
    registry = CollectorRegistry()
    registry.register(info)

    def pickers() -> list[gateways.Picker]:
        own = generate_latest(registry).decode()
        page = lora_info().rpartition("# TYPE vllm:lora_requests_info")[0] + own
        return [gateways.llm_d(page), gateways.inference_extension(page)]

    for held in (["clinic"], ["clinic", "code"], ["code"]):  # loaded, one more, one unloaded
        loaded.clear()
        for number, name in enumerate(held):
            loaded[number] = SimpleNamespace(lora_name=f"{name}@0123456789ab")
        for picker in pickers():
            assert picker.adapters == set(held)
            assert (picker.adapters_waiting, picker.max_adapters) == (set(), 4)
    loaded.clear()
    assert [picker.adapters for picker in pickers()] == [set(), set()]


async def test_models_name_the_base_as_parent_of_adapters(tmp_path: Path) -> None:
    async with adapted(tmp_path) as served:
        listed = (await served.http.get("/v1/models", headers=bearer("all"))).json()
        assert gateways.models(listed) == (["echo"], {"echo": ["auto", "clinic", "code"]})
        for card in listed["data"]:
            assert card["object"] == "model"
            assert isinstance(card["created"], int)
            assert isinstance(card["owned_by"], str)
        # production-stack takes the first for the model when it asks for one name.
        assert "parent" not in listed["data"][0]


async def test_an_adapter_is_asked_for_by_its_name(tmp_path: Path) -> None:
    async with adapted(tmp_path) as served:
        for path, body in ((CHAT, {"messages": [hello()]}), (TEXT, {"prompt": "Hello"})):
            asked = {"model": "clinic", **body}
            answer = await served.http.post(path, json=asked, headers=bearer("all"))
            assert answer.json()["model"] == "clinic"


def hello() -> dict[str, str]:
    return {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [hello()], "temperature": 0.0, "max_tokens": 3}),
        (TEXT, {"prompt": "Hello", "max_tokens": 3}),
    ],
)
async def test_static_health_checks_are_answered(path: str, body: dict[str, Any]) -> None:
    async with serving() as served:
        answer = await served.http.post(path, json={"model": "echo", **body}, timeout=10)
        assert answer.status_code == 200
        assert answer.json()["choices"]


async def test_no_engine_sleeps() -> None:
    async with serving() as served:
        assert (await served.http.get("/is_sleeping")).json() == {"is_sleeping": False}


async def test_probes_need_no_key_and_tell_alive_from_ready(tmp_path: Path) -> None:
    async with serving(keys=write_keys(tmp_path / "keys.yaml", only={})) as served:
        http, service = served.http, served.pipeline

        async def probes() -> tuple[int, int]:
            live, ready = [await http.get(f"/health/{what}") for what in ("live", "ready")]
            return live.status_code, ready.status_code

        assert await probes() == (200, 200)
        service.stop_admitting()
        assert await probes() == (200, 503)


async def test_a_gateways_headers_do_no_harm() -> None:
    """A request id is taken over; what else Envoy and routers add is not looked at."""
    request_id = str(uuid.uuid4())
    headers = {
        "x-request-id": request_id,
        "x-gateway-destination-endpoint": "10.0.0.1:8000",
        "x-gateway-model-name": "echo",
        "x-forwarded-for": "10.0.0.2",
        "x-envoy-attempt-count": "1",
    }
    async with serving() as served:
        body = {"model": "echo", "messages": [hello()]}
        answer = await served.http.post(CHAT, json=body, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == request_id


async def test_metrics_are_quick_enough_for_a_picker_that_polls() -> None:
    """It gives a scrape one second, and asks again every 50 ms."""
    async with serving() as served:
        took_s = []
        for _ in range(5):
            started_s = time.monotonic()
            answer = await served.http.get("/metrics")
            took_s.append(time.monotonic() - started_s)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/plain")
        assert min(took_s) < 0.5


async def test_routers_read_metrics_of_a_server_with_keys_if_it_lets_them(tmp_path: Path) -> None:
    """They send none."""
    keys = write_keys(tmp_path / "keys.yaml", only={})
    async with serving(keys=keys) as served:
        assert (await served.http.get("/metrics")).status_code == 401
    async with serving(keys=keys.model_copy(update={"open_metrics": True})) as served:
        assert (await served.http.get("/metrics")).status_code == 200
        assert (await served.http.get("/v1/models")).status_code == 401
        assert (await served.http.get("/admin/adapters")).status_code == 401
