"""Paths by vLLM's and SageMaker's names, as other programs call them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.api.admin import Admin
from packhorse.serve.errors import Conflict, NotFound
from packhorse.serve.messages import Caller
from packhorse.serve.settings import load, shown
from tests.client import CHAT, TEXT, events, hello
from tests.integration.serving import Held, bearer, serving, until, write_keys

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


class Operated(Admin):
    """Notes what it is asked."""

    def __init__(self) -> None:
        super().__init__(model="echo", settings={"http": {"port": 1}})
        self.asked: list[tuple[Any, ...]] = []
        self.there: set[str] = set()

    async def put_adapter(
        self, caller: Caller, name: str, path: str, *, replace: bool, pinned: bool | None
    ) -> Any:
        if name in self.there and not replace:
            raise Conflict("there is one")
        self.there.add(name)
        self.asked.append((caller.name, name, path, replace, pinned))

    async def remove_adapter(self, caller: Caller, name: str) -> None:
        if name not in self.there:
            raise NotFound("there is none")
        self.there.remove(name)


async def test_adapters_by_vllms_names() -> None:
    admin = Operated()
    async with serving(admin=admin) as server:
        body = {"lora_name": "clinic", "lora_path": "/adapters/clinic"}
        done = await server.http.post(LOAD, json={**body, "is_3d_lora_weight": False})
        assert done.status_code == 200
        assert done.text == "Success: LoRA adapter 'clinic' added successfully."
        again = await server.http.post(LOAD, json=body)
        assert again.status_code == 400
        assert "has already been loaded" in again.json()["error"]["message"]
        assert (await server.http.post(LOAD, json={**body, "load_inplace": True})).is_success
        assert admin.asked == [
            ("-", "clinic", "/adapters/clinic", replace, None) for replace in (False, True)
        ]
        gone = await server.http.post(UNLOAD, json={"lora_name": "clinic", "lora_int_id": 1})
        assert gone.text == "Success: LoRA adapter 'clinic' removed successfully."
        missing = await server.http.post(UNLOAD, json={"lora_name": "clinic"})
        assert missing.status_code == 404
        assert (await server.http.post(LOAD, json={"lora_name": "x"})).status_code == 400


async def test_who_may_call_them(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", user={}, op={"scopes": ["admin"]})
    async with serving(keys=keys, admin=Operated()) as server:
        http = server.http
        for method, path in (("POST", LOAD), ("POST", UNLOAD), ("GET", "/server_info")):
            for suffix in ("", "/"):
                assert (await http.request(method, path + suffix)).status_code == 401
                asked = await http.request(method, path + suffix, headers=bearer("user"))
                assert asked.status_code == 403
        assert (await http.get("/server_info", headers=bearer("op"))).status_code == 200
        for path in ("/load", "/is_sleeping", "/tokenizer_info", "/invocations"):
            assert (await http.get(path)).status_code == 401
        for method in ("GET", "POST", "HEAD"):
            assert (await http.request(method, "/ping")).status_code == 200


async def test_health_and_load() -> None:
    engine = Held()
    async with serving(engine=engine) as server:
        http = server.http
        assert (await http.get("/load")).json() == {"server_load": 0}
        asked = asyncio.create_task(http.post(CHAT, json=hello()))
        await until(lambda: engine.held == 1)
        assert (await http.get("/load")).json() == {"server_load": 1}
        engine.go.set()
        assert (await asked).status_code == 200
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": False}
        assert (await http.get("/tokenizer_info")).json()["tokenizer_class"]
        engine.dead = True
        assert (await http.get("/ping")).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_sagemakers_one_path(stream: bool) -> None:
    async with serving() as server:
        for path, body in ((CHAT, hello()), (TEXT, {"model": "echo", "prompt": "a b"})):
            body = {**body, "stream": stream}
            one = await server.http.post("/invocations", json=body)
            other = await server.http.post(path, json=body)
            assert one.status_code == other.status_code == 200
            found = [r.json()["choices"] if not stream else events(r) for r in (one, other)]
            if stream:
                found = [[event["choices"] for event in each] for each in found]
            assert found[0] == found[1]
        assert (await server.http.post("/invocations", json={"model": "echo"})).status_code == 400


def test_settings_are_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "PACKHORSE_CACHE__STORE": "redis://user:hidden@there:1/0",
        "PACKHORSE_CACHE__SECRET": "hidden-hidden-hidden",
        "PACKHORSE_AUTH__API_KEY": "hidden-hidden-hidden-1",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    engine = {"kind": "echo", "hf_token": "hidden", "max_num_seqs": 8}
    told = shown(load(None, {"engine": engine, "http": {"port": 1234}}))
    assert "hidden" not in str(told)
    assert told["http"]["port"] == 1234
    assert told["engine"]["max_num_seqs"] == 8
    assert told["adapters"]["quantum_tokens"] == 4096
