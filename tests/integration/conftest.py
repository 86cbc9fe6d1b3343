from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.raw_http import Connect, connecting


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with connecting() as made:
        yield made
