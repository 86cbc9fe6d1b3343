"""schemathesis over our own OpenAPI document: no 5xx, and no answer that the document does not
describe.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conftest import BIN, Server

CHECKS = ",".join(
    (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
)


def check_document(server: Server, folder: Path, *options: str) -> None:
    """Raises AssertionError with schemathesis' report when an answer is not as documented."""
    url = f"{server.url}/openapi.json"
    # A body may ask for a deadline that no engine can meet.
    (folder / "schemathesis.toml").write_text(
        '[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 504]\n'
    )
    command = [BIN / "schemathesis", "run", url, "--checks", CHECKS, "--generation-deterministic"]
    result = subprocess.run(
        [*command, *options], cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
