"""Every phase of schemathesis on the echo engine, for its speed; the real one is in tests/e2e."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Server
from tests.document import check_document


def test_every_answer_is_as_documented(echo_server: Server, tmp_path: Path) -> None:
    check_document(echo_server, tmp_path, "--max-examples", "40")
