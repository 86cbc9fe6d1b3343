"""Generate serve/rpc/pb from proto/, and list what the services promise; called by `make proto`.

    python tools/make_proto.py              # writes serve/rpc/pb
    python tools/make_proto.py --release    # and proto/released.txt: what later ones must keep

Only messages are generated: services are read from their descriptors, see serve/rpc/server.py.
Tests check that the generated code matches, and that nothing in released.txt was taken back.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "serve/rpc/pb"
RELEASED = ROOT / "proto/released.txt"
FILES = ("packhorse/v1/inference.proto", "packhorse/v1/admin.proto")


def generate(out: Path) -> list[str]:
    """Write the code to `out`; returns what the services promise, a line each."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        described = Path(scratch) / "described"
        options = [f"--python_out={scratch}", f"--pyi_out={scratch}"]
        options.append(f"--descriptor_set_out={described}")
        if code := protoc.main(["", f"-I{ROOT / 'proto'}", *options, *FILES]):
            sys.exit(code)
        for made in Path(scratch).glob("packhorse/v1/*"):
            (out / made.name).write_text(made.read_text(encoding="utf-8"), encoding="utf-8")
        return sorted(promises(FileDescriptorSet.FromString(described.read_bytes())))


def promises(described: Any) -> Iterator[str]:
    """What clients rely on: names, numbers, types, presence."""
    for file in described.file:
        for service in file.service:
            for method in service.method:
                stream = "stream " if method.server_streaming else ""
                yield (
                    f"{file.package}.{service.name}.{method.name}({method.input_type}) "
                    f"returns {stream}{method.output_type}"
                )
        for message in file.message_type:
            yield from _of_message(f"{file.package}.{message.name}", message)
        for enum in file.enum_type:
            yield from _of_enum(f"{file.package}.{enum.name}", enum)


def _of_message(name: str, message: DescriptorProto) -> Iterator[str]:
    oneofs = [oneof.name for oneof in message.oneof_decl]
    for field in message.field:
        kind = field.type_name or FieldDescriptorProto.Type.Name(field.type)
        label = FieldDescriptorProto.Label.Name(field.label)
        within = f" in {oneofs[field.oneof_index]}" if field.HasField("oneof_index") else ""
        yield f"{name}.{field.name} = {field.number} {label} {kind}{within}"
    for nested in message.nested_type:
        yield from _of_message(f"{name}.{nested.name}", nested)
    for enum in message.enum_type:
        yield from _of_enum(f"{name}.{enum.name}", enum)


def _of_enum(name: str, enum: EnumDescriptorProto) -> Iterator[str]:
    for value in enum.value:
        yield f"{name}.{value.name} = {value.number}"


if __name__ == "__main__":
    lines = generate(OUT)
    if "--release" in sys.argv[1:]:
        RELEASED.write_text("\n".join(lines) + "\n", encoding="utf-8")
