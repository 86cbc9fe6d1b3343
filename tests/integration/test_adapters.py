"""Adapters and routing over HTTP, on the echo engine: who may see and use what, and operators'
calls. That adapters answer right is for tests/e2e.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import httpx

from packhorse.serve.adapters.base_layers import linear_layers
from packhorse.serve.adapters.formats import AdapterLimits
from packhorse.serve.adapters.registry import Registry
from packhorse.serve.adapters.store import AdapterStore
from packhorse.serve.api.admin import Admin
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.routing.router import Router
from packhorse.serve.settings.engine import EngineSettings
from tests.client import CHAT, TEXT, hello
from tests.conftest import DEMO
from tests.integration.serving import Served, bearer, serving, write_keys

ADAPTERS = DEMO / "adapters"
KEYS = {
    "all": {"scopes": ["inference", "admin", "metrics"]},
    "narrow": {"adapters": ["clinic"]},
}


def write_routes(folder: Path, forbidden: str = "base") -> Path:
    rules = [
        {"name": name, "adapter": name, "when": {"keywords": [word]}}
        for name, word in (("clinic", "dose"), ("code", "command"))
    ]
    document = {"forbidden": forbidden, "rules": rules, "learned": {"enabled": False}}
    (folder / "routes.yaml").write_text(json.dumps(document))
    return folder / "routes.yaml"


@asynccontextmanager
async def adapted(
    folder: Path, *, forbidden: str = "base", engine: EchoEngine | None = None
) -> AsyncIterator[Served]:
    """A server with the adapters clinic and code, keys, and a rule for each adapter. More may come
    from `folder`/allowed.
    """
    engine = engine or EchoEngine(EngineSettings(kind="echo"))
    metrics = ModelMetrics("echo")
    with closing(AdapterStore(folder / "store")) as store:
        registry = Registry(
            store, max_registered=10, max_resident=4, taken=frozenset({"echo"}),
            allowed_roots=(DEMO, folder / "allowed"), metrics=metrics,
        )  # fmt: skip
        layers = linear_layers(DEMO / "model")
        limits = AdapterLimits(max_rank=16, layers=layers, max_bytes=2**24)
        await registry.start(engine, limits, slots=2)
        for name in ("clinic", "code"):
            await registry.put(name, ADAPTERS / name, replace=False)
        routes = write_routes(folder, forbidden)
        router = Router(routes, registry.folders, registry, metrics=metrics)
        await router.start()
        keys = write_keys(folder / "keys.yaml", **KEYS)
        async with serving(
            engine=engine, keys=keys, adapters=registry, routing=router,
            admin=Admin(registry, router), metrics=metrics,
        ) as served:  # fmt: skip
            yield served
        await registry.settle()


async def names(http: httpx.AsyncClient, key: str) -> list[str]:
    listed = (await http.get("/v1/models", headers=bearer(key))).json()["data"]
    return [card["id"] for card in listed]


async def test_a_key_sees_and_uses_its_adapters_alone(tmp_path: Path) -> None:
    async with adapted(tmp_path) as served:
        http = served.http
        assert await names(http, "all") == ["echo", "auto", "clinic", "code"]
        assert await names(http, "narrow") == ["echo", "auto", "clinic"]
        for model, status in (("clinic", 200), ("code", 403), ("no-such", 403), ("echo", 200)):
            for path, body in (
                (CHAT, hello(model=model)),
                (TEXT, {"model": model, "prompt": "x"}),
                ("/v1/route", hello(model=model)),
                ("/tokenize", {"model": model, "prompt": "x"}),
                ("/detokenize", {"model": model, "tokens": [1]}),
            ):
                answer = await http.post(path, json=body, headers=bearer("narrow"))
                assert answer.status_code == status, (path, model, answer.text)
            card = await http.get(f"/v1/models/{model}", headers=bearer("narrow"))
            assert card.status_code == status
        answer = await http.post(CHAT, json=hello(model="no-such"), headers=bearer("all"))
        assert answer.status_code == 404
        assert "'clinic'" in answer.json()["error"]["message"]


async def test_the_text_chooses_and_the_answer_says_so(tmp_path: Path) -> None:
    async with adapted(tmp_path) as served:
        for text, adapter, stage in (
            ("which dose?", "clinic", "rules"), ("hello you", "echo", "default"),
        ):  # fmt: skip
            for stream in (False, True):
                body = hello(text, model="auto", stream=stream)
                answer = await served.http.post(CHAT, json=body, headers=bearer("all"))
                assert answer.headers["x-packhorse-model"] == adapter
                assert answer.headers["x-packhorse-route"] == stage
                assert f'"model": "{adapter}"' in answer.text
        body = {"model": "auto", "prompt": ["which dose?", "which command?"]}
        answer = await served.http.post(TEXT, json=body, headers=bearer("all"))
        assert answer.headers["x-packhorse-model"] == "clinic, code"
        body = {"model": "auto", "prompt": [1, 2, 3]}
        answer = await served.http.post(TEXT, json=body, headers=bearer("all"))
        assert answer.headers["x-packhorse-model"] == "echo"


async def test_a_route_to_what_a_key_may_not_use(tmp_path: Path) -> None:
    asked = hello("which command?", model="auto")
    async with adapted(tmp_path) as served:
        answer = await served.http.post("/v1/route", json=asked, headers=bearer("narrow"))
        assert answer.json()["adapter"] is None
        assert "may not use" in answer.json()["reason"]
        assert "code" not in answer.text
        answer = await served.http.post(CHAT, json=asked, headers=bearer("narrow"))
        assert answer.headers["x-packhorse-model"] == "echo"
    (tmp_path / "refuse").mkdir()
    async with adapted(tmp_path / "refuse", forbidden="refuse") as served:
        answer = await served.http.post(CHAT, json=asked, headers=bearer("narrow"))
        assert answer.status_code == 403
        assert "code" not in answer.json()["error"]["message"]


async def test_operators_calls_need_their_scope(tmp_path: Path) -> None:
    async with adapted(tmp_path) as served:
        for method, path in (
            ("GET", "/admin/adapters"), ("GET", "/admin/adapters/clinic"),
            ("POST", "/admin/adapters"), ("PATCH", "/admin/adapters/clinic"),
            ("DELETE", "/admin/adapters/clinic"), ("GET", "/admin/routes"),
            ("POST", "/admin/routes/reload"), ("POST", "/admin/routes/rollback"),
        ):  # fmt: skip
            answer = await served.http.request(method, path, headers=bearer("narrow"), json={})
            assert answer.status_code == 403, path
        admin = bearer("all")
        card = (await served.http.get("/admin/adapters/clinic", headers=admin)).json()
        assert (card["state"], card["rank"]) == ("resident", 8)
        answer = await served.http.delete("/admin/adapters/clinic", headers=admin)
        assert answer.json() == {"name": "clinic", "removed": True}
        assert await names(served.http, "narrow") == ["echo", "auto"]
        assert (await served.http.delete("/admin/adapters/x", headers=admin)).status_code == 404


async def test_routes_are_shown_reloaded_and_rolled_back(tmp_path: Path) -> None:
    async with adapted(tmp_path) as served:
        http, admin = served.http, bearer("all")
        assert (await http.post("/admin/routes/rollback", headers=admin)).status_code == 409
        (shown,) = (await http.get("/admin/routes", headers=admin)).json()["data"]
        assert shown["rules"] == ["clinic", "code"]
        (tmp_path / "routes.yaml").write_text("rules: []\nlearned: {enabled: false}\n")
        answer = (await http.post("/admin/routes/reload", headers=admin)).json()
        assert answer["accepted"] is True
        asked = hello("which dose?", model="auto")
        assert (await http.post("/v1/route", json=asked, headers=admin)).json()["adapter"] is None
        answer = (await http.post("/admin/routes/rollback", headers=admin)).json()
        assert answer["number"] == shown["number"]
        decision = (await http.post("/v1/route", json=asked, headers=admin)).json()
        assert decision["adapter"] == "clinic"


async def test_a_server_without_adapters_says_so() -> None:
    async with serving() as served:
        for path in ("/admin/adapters", "/admin/routes"):
            answer = await served.http.get(path)
            assert answer.status_code == 404
            assert "adapters" in answer.json()["error"]["message"]
        assert (await served.http.post(CHAT, json=hello(model="auto"))).status_code == 404
        answer = await served.http.post("/v1/route", json=hello())
        assert answer.json()["stage"] == "explicit"
        assert "x-packhorse-model" not in (await served.http.post(CHAT, json=hello())).headers
