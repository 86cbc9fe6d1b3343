"""The gRPC services: generated code matches, and nothing that was released is taken back."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from packhorse.serve.errors import ERROR_MAPPINGS
from packhorse.serve.rpc.pb import admin_pb2, inference_pb2
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_proto", ROOT / "tools/make_proto.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_code_matches(tool: ModuleType, tmp_path: Path) -> None:
    tool.generate(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    held = {path.name: path.read_text() for path in (ROOT / "serve/rpc/pb").glob("*_pb2.py*")}
    assert made == held, "run `make proto`"


def test_nothing_that_was_released_is_taken_back(tool: ModuleType, tmp_path: Path) -> None:
    now = set(tool.generate(tmp_path))
    released = set((ROOT / "proto/released.txt").read_text().splitlines())
    assert released
    assert not released - now, "see proto/README.md"


def described(module: ModuleType) -> FileDescriptorProto:
    found = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(found)
    return found


@pytest.mark.parametrize("change", ["remove", "renumber", "rename", "retype", "presence", "method"])
def test_a_breaking_change_is_noticed(tool: ModuleType, change: str) -> None:
    file = described(inference_pb2)
    before = set(tool.promises(FileDescriptorSet(file=[file])))
    options = next(message for message in file.message_type if message.name == "Options")
    field = options.field[0]
    match change:
        case "remove":
            del options.field[0]
        case "renumber":
            field.number = 99
        case "rename":
            field.name = "count"
        case "retype":
            field.type = field.TYPE_STRING
        case "presence":
            field.ClearField("oneof_index")
        case "method":
            file.service[0].method[1].server_streaming = False
    assert before - set(tool.promises(FileDescriptorSet(file=[file])))


def test_adding_is_no_breaking_change(tool: ModuleType) -> None:
    file = described(inference_pb2)
    before = set(tool.promises(FileDescriptorSet(file=[file])))
    file.message_type[0].field.add(name="new", number=500, type=9, label=1)
    assert not before - set(tool.promises(FileDescriptorSet(file=[file])))


def test_every_scalar_option_tells_zero_from_unset() -> None:
    for message in (
        inference_pb2.Options,
        inference_pb2.ChatRequest,
        inference_pb2.CompleteRequest,
    ):
        for field in message.DESCRIPTOR.fields:
            if field.is_repeated or field.message_type or field.name == "model":
                continue
            assert field.has_presence, f"{message.DESCRIPTOR.name}.{field.name}"


def test_every_kind_of_error_has_a_code_that_grpc_knows() -> None:
    known = {code.name for code in grpc.StatusCode}
    assert {mapping.grpc for mapping in ERROR_MAPPINGS.values()} <= known
    assert admin_pb2.DESCRIPTOR.package == "packhorse.v1"
