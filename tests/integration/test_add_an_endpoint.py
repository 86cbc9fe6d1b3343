"""The code of docs/add-an-endpoint.md, added to a running server and called over both protocols."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_tools import protoc

from packhorse.serve.rest import app
from packhorse.serve.rpc import inference, server
from tests.conftest import ROOT
from tests.integration.grpc_serving import twins
from tests.protocol_parity import method

PROTO = "packhorse/v1/inference.proto"
BLOCK = re.compile(r"^```(?:python|proto)\n(?:#|//) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_of_the_page() -> dict[str, str]:
    """File -> what the page puts there."""
    text = (ROOT / "docs/add-an-endpoint.md").read_text(encoding="utf-8")
    return {match[1]: match[2] for match in BLOCK.finditer(text)}


def load(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The code as the module packhorse.NAME."""
    module = ModuleType(f"packhorse.{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    package, _, attribute = module.__name__.rpartition(".")
    monkeypatch.setattr(sys.modules[package], attribute, module, raising=False)
    exec(compile(code, module.__name__, "exec"), vars(module))
    return module


def compiled(addition: str, folder: Path) -> Any:
    """The descriptor of inference.proto with the page's service method and messages added."""
    text = (ROOT / "proto" / PROTO).read_text(encoding="utf-8")
    service = re.search(r"service Inference \{\n(.*?)\}\n", addition, re.DOTALL)
    assert service is not None
    text = text.replace("service Inference {\n", "service Inference {\n" + service[1], 1)
    source = folder / PROTO
    source.parent.mkdir(parents=True)
    source.write_text(text + addition.replace(service[0], ""), encoding="utf-8")
    out = folder / "described"
    assert protoc.main(["", f"-I{folder}", f"--descriptor_set_out={out}", PROTO]) == 0
    (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    pool = DescriptorPool()  # another than that of the generated code, which has this file too
    pool.Add(file)
    return pool.FindFileByName(PROTO)


async def test_the_endpoint_of_the_page_answers_over_both_protocols(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = code_of_the_page()
    assert set(code) == {
        "serve/api/token_count.py", "serve/rest/token_count.py", f"proto/{PROTO}",
        "serve/rpc/inference.py",
    }  # fmt: skip
    load("serve.api.token_count", code["serve/api/token_count.py"], monkeypatch)
    route = load("serve.rest.token_count", code["serve/rest/token_count.py"], monkeypatch)
    monkeypatch.setattr(app, "ENDPOINTS", (*app.ENDPOINTS, route.routes))

    file = compiled(code[f"proto/{PROTO}"], tmp_path)
    messages = {name: GetMessageClass(found) for name, found in file.message_types_by_name.items()}
    monkeypatch.setattr(server, "INFERENCE", file.services_by_name["Inference"])
    namespace = {**vars(inference), "pb": SimpleNamespace(**messages)}
    exec(code["serve/rpc/inference.py"], namespace)
    handler = namespace["count_tokens"]
    monkeypatch.setattr(inference.Inference, "count_tokens", handler, raising=False)

    async with twins() as both:
        http = both.served.http
        answer = await http.post("/v1/count_tokens", json={"prompt": "one two three"})
        assert answer.status_code == 200
        assert answer.json()["tokens"] == 3
        assert answer.json()["room"] > 0
        missing = await http.post("/v1/count_tokens", json={})
        assert missing.status_code == 400
        assert missing.json()["error"]["param"] == "prompt"

        call = method(both.channel, "CountTokens", messages["CountTokensResponse"])
        said = await call(messages["CountTokensRequest"](prompt="one two three"))
        assert {"tokens": said.tokens, "room": said.room} == answer.json()


def test_a_method_without_a_handler_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = compiled(code_of_the_page()[f"proto/{PROTO}"], tmp_path)
    calls: Any = SimpleNamespace()
    with pytest.raises(RuntimeError, match=r"\['count_tokens'\] only on one side"):
        server._methods(calls, file.services_by_name["Inference"], inference.Inference(calls), "")  # type: ignore[arg-type]
