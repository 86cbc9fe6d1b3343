"""Generate serve/rpc/pb from proto/; called by `make proto`. A test checks that both match.

    python tools/make_proto.py [FOLDER]

Only messages: services are read from their descriptors, see serve/rpc/server.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "serve/rpc/pb"
FILES = ("inference", "admin")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        names = [f"packhorse/v1/{name}.proto" for name in FILES]
        code = protoc.main(
            ["", f"-I{ROOT / 'proto'}", f"--python_out={scratch}", f"--pyi_out={scratch}", *names]
        )
        if code:
            sys.exit(code)
        for made in Path(scratch).glob("packhorse/v1/*"):
            (out / made.name).write_text(made.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
