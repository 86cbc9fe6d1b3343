"""Every phase of schemathesis on the echo engine, for its speed; the real one is in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Server
from tests.document import check_document


# What a field may be is tried bound by bound in the coverage phase, whatever the number is. It is
# of random documents for each operation, beyond those.
@pytest.mark.parametrize("examples", [10, pytest.param(100, marks=pytest.mark.thorough)])
def test_every_answer_is_as_documented(echo_server: Server, tmp_path: Path, examples: int) -> None:
    check_document(echo_server, tmp_path, "--max-examples", str(examples))
