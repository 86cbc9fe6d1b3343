"""Who shares answers with whom, and who may use which model: over HTTP and over gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.client import CHAT, TEXT, hello
from tests.integration.caching import caching, greedy, mark
from tests.integration.grpc_serving import twins
from tests.integration.serving import bearer, write_keys


@pytest.mark.parametrize("sampling", [{"seed": -1}, {"seed": -1, "top_p": 0.9}, {}])
async def test_a_seed_that_means_random_is_none(sampling: dict[str, Any]) -> None:
    """-1 is how clients that cannot leave the field out ask for a fresh sample."""
    body = {**hello(), "temperature": 1.5, **sampling}
    async with caching(delay_s=0.01) as served:
        one_after_the_other = [await mark(served, body) for _ in range(2)]
        at_once = await asyncio.gather(*(mark(served, body) for _ in range(2)))
        assert {*one_after_the_other, *at_once} == {"bypass"}
        assert await mark(served, {**body, "seed": 1}) == "miss"
        assert await mark(served, {**body, "seed": 1}) == "hit"


async def test_users_behind_one_key_are_apart_by_their_salts() -> None:
    async with caching() as served:
        asked = [greedy(cache_salt=salt) for salt in ("user-a", "user-b", "user-a")]
        assert [await mark(served, body) for body in asked] == ["miss", "miss", "hit"]
        assert await mark(served, greedy()) == "miss"


@pytest.mark.parametrize(("path", "asked"), [(CHAT, hello()), (TEXT, {"prompt": "one two"})])
async def test_a_key_can_be_kept_from_the_base(
    path: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    entries = {"all": {}, "none": {"base": False}}
    async with twins(keys=write_keys(tmp_path / "keys.yaml", **entries)) as both:
        body = {**asked, "model": "echo"}
        refused = await both.ask_http(path, body, **bearer("none"))
        assert refused.kind == "forbidden"
        assert "may not use 'echo'" in refused.message
        over_grpc = await both.ask(path, body, **bearer("none"))
        assert (over_grpc.kind, over_grpc.message) == (refused.kind, refused.message)
        for ask in (both.ask, both.ask_http):
            assert not hasattr(await ask(path, body, **bearer("all")), "kind")
        http = both.served.http
        listed = await http.get("/v1/models", headers=bearer("none"))
        assert listed.json()["data"] == []
        assert (await http.get("/v1/models/echo", headers=bearer("none"))).status_code == 403
        sent = {"prompt": "one", "model": "echo"}
        assert (await http.post("/tokenize", json=sent, headers=bearer("none"))).status_code == 403
        sent = hello()
        assert (await http.post("/v1/route", json=sent, headers=bearer("none"))).status_code == 403
