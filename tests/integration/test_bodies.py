"""Bodies that do not say how long they are. Those that do are in test_limits.py."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tests.client import CHAT
from tests.integration.serving import serving


async def spaces(parts: int) -> AsyncIterator[bytes]:
    for _ in range(parts):
        yield b" " * 600


async def test_a_body_in_chunks_is_limited_as_a_whole() -> None:
    async with serving(http={"max_body_bytes": 1024}) as server:
        for parts, code in ((1, "invalid"), (2, "too_large"), (50, "too_large")):
            response = await server.http.post(CHAT, content=spaces(parts))
            assert "content-length" not in response.request.headers
            assert response.json()["error"]["kind"] == code, parts
