"""Random bodies of schemathesis on the real engine; all its phases are in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Server
from tests.document import check_document


@pytest.mark.thorough  # test_faults.py sends the real engine 2,000 odd requests
def test_every_answer_of_the_real_engine_is_as_documented(
    int8_server: Server, tmp_path: Path
) -> None:
    options = ("--phases", "fuzzing", "--max-examples", "50", "--request-timeout", "60")
    check_document(int8_server, tmp_path, *options)
