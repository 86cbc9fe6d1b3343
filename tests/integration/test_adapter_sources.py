"""Where operators may add adapters from, over HTTP and gRPC alike; and what is left in /metrics of
one that is gone.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import httpx
from prometheus_client import generate_latest

from packhorse.serve.access.keys import Keys
from packhorse.serve.api.admin import Admin
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.rpc.pb import admin_pb2
from packhorse.serve.rpc.server import RpcServer
from packhorse.serve.settings.auth import AuthSettings
from packhorse.serve.settings.rpc import RpcSettings
from tests.client import CHAT, hello
from tests.conftest import DEMO, running_server
from tests.integration.serving import Held, Served, bearer, until
from tests.integration.test_adapters import ADAPTERS, adapted
from tests.protocol_parity import failed_in_grpc, metadata

ADMIN = bearer("all")


async def put(http: httpx.AsyncClient, name: str, path: str) -> httpx.Response:
    return await http.post("/admin/adapters", json={"name": name, "path": path}, headers=ADMIN)


async def test_a_path_outside_the_allowed_roots_is_refused_on_both_protocols(
    tmp_path: Path,
) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(ADAPTERS / "clinic", outside)
    shutil.copytree(ADAPTERS / "clinic", tmp_path / "allowed" / "clinic")
    (tmp_path / "allowed" / "out").symlink_to(outside)
    inside = str(tmp_path / "allowed" / "clinic")
    async with adapted(tmp_path) as served:
        admin = Admin(served.pipeline.models.first.adapters)
        keys = Keys(AuthSettings(keys_file=tmp_path / "keys.yaml"))
        rpc = RpcServer(served.pipeline, admin, keys, RpcSettings(port=0))
        await rpc.start()
        try:
            async with grpc.aio.insecure_channel(rpc.address) as channel:
                add = channel.unary_unary(
                    "/packhorse.v1.Admin/PutAdapter",
                    request_serializer=admin_pb2.PutAdapterRequest.SerializeToString,
                    response_deserializer=admin_pb2.Adapter.FromString,
                )

                async def over_grpc(path: str) -> Any:
                    asked = admin_pb2.PutAdapterRequest(name="rpc", path=path, replace=True)
                    try:
                        return await add(asked, metadata=metadata(ADMIN))
                    except grpc.aio.AioRpcError as error:
                        return failed_in_grpc(error)

                refused = set()
                for path in (
                    str(outside), str(tmp_path / "no-such"), "/etc", "/etc/shadow",
                    str(tmp_path / "allowed" / "out"), str(tmp_path / "allowed" / ".." / "outside"),
                    "/\0",
                ):  # fmt: skip
                    answer = await put(served.http, "http", path)
                    assert answer.status_code == 400, answer.text
                    error = answer.json()["error"]
                    other = await over_grpc(path)
                    assert (other.code, other.kind) == ("INVALID_ARGUMENT", "invalid")
                    assert error["param"] == other.param == "path"
                    assert error["message"] == other.message
                    if ".." not in path:
                        assert "adapters.allowed_roots" in other.message
                        refused.add(other.message.replace(repr(path), "PATH"))
                assert len(refused) == 1, "the same whether there is something or not"
                assert (await put(served.http, "http", inside)).json()["state"] == "resident"
                assert (await over_grpc(inside)).name == "rpc"
        finally:
            await rpc.stop(0)


def hub_snapshot(cache: Path) -> Path:
    """As huggingface_hub lays its cache out: files are links to blobs."""
    model = cache / "models--org--clinic"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots" / "0123").mkdir(parents=True)
    for file in (ADAPTERS / "clinic").iterdir():
        shutil.copy(file, model / "blobs" / file.name)
        (model / "snapshots" / "0123" / file.name).symlink_to(f"../../blobs/{file.name}")
    return model / "snapshots" / "0123"


def test_a_server_allows_its_watched_folder_and_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub")
    for folder in ("watched", "elsewhere"):
        shutil.copytree(ADAPTERS / "code", tmp_path / folder / "code")
    arguments = [str(DEMO / "model"), "--engine", "echo", "--adapters", str(tmp_path / "watched")]
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    here = {
        "hub": str(snapshot),
        "copy": str(tmp_path / "watched" / "code"),
        "elsewhere": str(tmp_path / "elsewhere" / "code"),
    }

    def states(**more: str) -> dict[str, int]:
        with (
            running_server(tmp_path, *arguments, environment={**environment, **more}) as server,
            httpx.Client(base_url=server.url, timeout=30) as http,
        ):
            return {
                name: http.post(
                    "/admin/adapters", json={"name": name, "path": path, "replace": True}
                ).status_code
                for name, path in here.items()
            }

    assert states() == {"hub": 200, "copy": 200, "elsewhere": 400}
    setting = json.dumps([str(tmp_path / "elsewhere")])
    assert states(PACKHORSE_ADAPTERS__ALLOWED_ROOTS=setting) == {
        "hub": 400, "copy": 200, "elsewhere": 200,
    }  # fmt: skip


def series(served: Served, name: str) -> list[str]:
    """The model's series that are about an adapter of that name."""
    registry = served.pipeline.models.first.metrics.registry
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if f'adapter="{name}"' in line]


async def removed(served: Served, name: str) -> None:
    answer = await served.http.delete(f"/admin/adapters/{name}", headers=ADMIN)
    assert answer.status_code == 200


async def test_an_adapter_that_is_gone_leaves_no_series(tmp_path: Path) -> None:
    async with adapted(tmp_path) as served:
        for number in range(5):
            name = f"short-lived-{number}"
            await put(served.http, name, str(ADAPTERS / "clinic"))
            answer = await served.http.post(CHAT, json=hello(model=name), headers=ADMIN)
            assert answer.status_code == 200
            assert len(series(served, name)) >= 2, "waiting, and routes"
            await removed(served, name)
            await until(lambda name=name: not series(served, name))  # type: ignore[misc]
        assert series(served, "clinic"), "that of others stay"


async def test_a_late_request_brings_no_series_back(tmp_path: Path) -> None:
    engine = Held()
    async with adapted(tmp_path, engine=engine) as served:
        await put(served.http, "late", str(ADAPTERS / "clinic"))
        body = hello(model="late")
        asking = asyncio.create_task(served.http.post(CHAT, json=body, headers=ADMIN))
        await until(lambda: engine.held == 1)
        await removed(served, "late")
        refused = await served.http.post(CHAT, json=body, headers=ADMIN)
        assert refused.status_code == 404
        assert series(served, "late"), "one request is there"
        engine.go.set()
        assert (await asking).status_code == 200
        await until(lambda: not series(served, "late"))
        refused = await served.http.post(CHAT, json=body, headers=ADMIN)
        assert refused.status_code == 404
        assert series(served, "late") == []


def test_every_metric_by_adapter_is_forgotten_with_it() -> None:
    metrics = ModelMetrics()
    found = {
        metric
        for metric in vars(metrics).values()
        if "adapter" in getattr(metric, "_labelnames", ())
    }
    assert found == set(metrics.by_adapter)
