"""gRPC from other processes: fresh stubs, reflection, the example, and a server that drains."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.client import CHAT
from tests.conftest import ROOT, Server, running_server
from tests.integration.grpc_serving import chat
from tests.protocol_parity import NotExpressible, as_message, method, said_in_messages


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """`packhorse serve` in a process of its own."""
    folder = tmp_path_factory.mktemp("grpc")
    with running_server(folder, "--engine", "echo", "--grpc-port", "0") as server:
        line = next(line for line in server.log().splitlines() if "gRPC at" in line)
        yield server, line.rpartition(" ")[2]


def test_stubs_that_a_client_has_made(running: tuple[Server, str], tmp_path: Path) -> None:
    """Generated fresh from proto/, and used in another process."""
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}",
            f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}",
            "packhorse/v1/inference.proto", "packhorse/v1/admin.proto",
        ],
        check=True,
    )  # fmt: skip
    (tmp_path / "client.py").write_text(
        "import sys, grpc\n"
        "from packhorse.v1 import inference_pb2 as pb, inference_pb2_grpc\n"
        "with grpc.insecure_channel(sys.argv[1]) as channel:\n"
        "    stub = inference_pb2_grpc.InferenceStub(channel)\n"
        "    message = pb.Message(role='user', content='one two')\n"
        "    request = pb.ChatRequest(model='echo', messages=[message])\n"
        "    print(stub.Chat(request).choices[0].message.content)\n"
        "    print(''.join(chunk.content for chunk in stub.ChatStream(request)))\n"
    )
    done = subprocess.run(
        [sys.executable, "client.py", running[1]],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "one two\none two\n"


def test_reflection_is_enough_for_a_call(running: tuple[Server, str]) -> None:
    with grpc.insecure_channel(running[1]) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("packhorse.v1.Inference")
        chat_method = service.methods_by_name["Chat"]
        request = message_factory.GetMessageClass(chat_method.input_type)(model="echo")
        request.messages.add(role="user", content="one two")
        call = channel.unary_unary(
            "/packhorse.v1.Inference/Chat",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(
                chat_method.output_type
            ).FromString,
        )
        assert call(request).choices[0].message.content == "one two"


def test_the_example_client(running: tuple[Server, str]) -> None:
    example = ROOT / "examples/grpc_client.py"
    done = subprocess.run(
        [sys.executable, example, "--address", running[1], "one two", "--model", "echo"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "one two\n(2 tokens read, 2 written)\n"


def test_a_drain_lets_calls_end(tmp_path: Path) -> None:
    settings = tmp_path / "serve.yaml"
    settings.write_text("engine: {echo_delay_s: 0.1}\n")
    arguments = ("--engine", "echo", "--config", str(settings), "--grpc-port", "0")
    with running_server(tmp_path, *arguments) as server:
        address = server.log().split("gRPC at ")[1].split()[0]
        with grpc.insecure_channel(address) as channel:
            call = method(channel, "ChatStream")(as_message(*chat("a b c d e f g h i j"))[1])
            next(call)
            server.process.terminate()
            assert said_in_messages(list(call)).choices[0].text == "a b c d e f g h i j"
        assert server.process.wait(60) == 0


def test_what_is_not_expressible_is_said() -> None:
    with pytest.raises(NotExpressible):
        as_message(CHAT, {"model": "m", "messages": [{"role": "user", "content": 5}]})
