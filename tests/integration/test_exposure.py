"""Servers without keys: who may make operators' calls, over HTTP and gRPC."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import grpc
import httpx
import pytest

from packhorse.serve.access.keys import Keys
from packhorse.serve.api.admin import Admin
from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.models import Model, Models
from packhorse.serve.pipeline import Pipeline
from packhorse.serve.rest.app import build_app
from packhorse.serve.rpc.pb import admin_pb2, inference_pb2
from packhorse.serve.settings.auth import AuthSettings
from packhorse.serve.settings.http import HttpSettings
from tests.client import CHAT, hello, request_lines
from tests.integration.grpc_serving import Twins, chat, twins
from tests.integration.strangers import keyless, own_address, raw, status_of
from tests.protocol_parity import Failed

EVIL = "http://evil.example"
PAGE = "https://chat.example.org"
ADAPTERS = "/admin/adapters"
WAYS_OUT = ("auth.admin_key", "auth.keys_file", "http.admin_port", "auth.without_keys: everything")


async def test_operators_calls_from_this_machine_need_no_key() -> None:
    async with keyless() as server:
        port = server.address[1]
        assert (await server.http.get("/admin/cache")).status_code == 200
        assert (await server.http.delete("/admin/cache")).status_code == 200
        for host in (f"localhost:{port}", "LOCALHOST", "127.0.0.1", f"[::1]:{port}"):
            answer = await server.http.get("/admin/cache", headers={"host": host})
            assert answer.status_code == 200, host
        # Neither a Host nor an Origin: HTTP/1.0, and scripts.
        assert status_of(await raw(server.address, "GET /admin/cache HTTP/1.0")) == 200
        body = json.dumps({"name": "a", "path": "/nowhere"})
        for kind in ("text/plain", "application/x-www-form-urlencoded"):
            asked = {"content": body, "headers": {"content-type": kind}}
            answer = await server.http.post(ADAPTERS, **asked)
            assert answer.status_code == 404, "it is taken, by a server without adapters"
        # The server's own pages, and those that its operator names.
        own = {"origin": f"http://127.0.0.1:{port}"}
        assert (await server.http.get("/admin/cache", headers=own)).status_code == 200


@pytest.mark.parametrize("without_keys", ["loopback", "inference", "everything"])
async def test_a_web_page_cannot_make_operators_calls(without_keys: str) -> None:
    """What a browser sends without asking first: a POST of text/plain, with the page's Origin."""
    async with keyless(without_keys=without_keys) as server:
        port = server.address[1]
        for origin in (EVIL, f"http://localhost:{port + 1}", f"https://127.0.0.1:{port}", "null"):
            headers = {"origin": origin, "content-type": "text/plain"}
            for path in ("/admin/cache", ADAPTERS, "/admin/routes/reload", "/%61dmin/cache"):
                answer = await server.http.post(path, content=b"{}", headers=headers)
                assert answer.status_code == 403, (origin, path)
                assert "http.cors_origins" in answer.json()["error"]["message"]
                assert "access-control-allow-origin" not in answer.headers
            preflight = {"origin": origin, "access-control-request-method": "DELETE"}
            answer = await server.http.options("/admin/cache", headers=preflight)
            assert answer.status_code == 403, origin
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origins", [("*",), ("null",), ("*", "null")])
async def test_an_origin_that_anybody_can_have_opens_inference_alone(
    origins: tuple[str, ...],
) -> None:
    async with keyless(http={"cors_origins": origins}) as server:
        for origin in (EVIL, "null"):
            asked = {"origin": origin, "access-control-request-method": "POST"}
            answer = await server.http.options(CHAT, headers=asked)
            assert (answer.status_code == 200) == (origin in origins or "*" in origins)
            for method in ("OPTIONS", "GET", "DELETE"):
                answer = await server.http.request(method, "/admin/cache", headers=asked)
                assert answer.status_code == 403, (origin, method)
                assert "access-control-allow-origin" not in answer.headers


async def test_a_page_that_the_operator_names_may() -> None:
    async with keyless(http={"cors_origins": (PAGE,)}) as server:
        asked = {"origin": PAGE, "access-control-request-method": "DELETE"}
        assert (await server.http.options("/admin/cache", headers=asked)).status_code == 200
        answer = await server.http.delete("/admin/cache", headers={"origin": PAGE})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE


async def test_a_name_that_is_pointed_at_this_machine_is_refused() -> None:
    """DNS rebinding: the page's own name leads here, so Origin and Host agree."""
    async with keyless() as server:
        host = f"evil.example:{server.address[1]}"
        for headers in (
            {"host": host},
            {"host": host, "origin": f"http://{host}"},
            {"host": "localhost.evil.example"},
            {"host": "127.0.0.1.evil.example"},
            {"host": "user@127.0.0.1"},
            {"host": ""},
        ):
            for method in ("GET", "DELETE"):
                answer = await server.http.request(method, "/admin/cache", headers=headers)
                assert answer.status_code == 403, headers
                assert "http.allowed_hosts" in answer.json()["error"]["message"]
        twice = await raw(server.address, "GET /admin/cache HTTP/1.1", "host: localhost",
                          "host: evil.example")  # fmt: skip
        assert status_of(twice) in (400, 403)


async def test_names_can_be_allowed() -> None:
    async with keyless(http={"allowed_hosts": ("ops.example", "box.example:81")}) as server:
        for host, status in [
            ("ops.example", 200), ("OPS.example:8000", 200), ("box.example:81", 200),
            ("box.example:82", 403), ("box.example", 403), ("localhost", 403),
        ]:  # fmt: skip
            answer = await server.http.get("/admin/cache", headers={"host": host})
            assert answer.status_code == status, host


FORWARDED = [
    "forwarded", "x-forwarded-for", "X-Forwarded-Host", "x-forwarded-proto", "x-real-ip", "via",
    "cf-connecting-ip", "true-client-ip", "x-envoy-external-address", "x-original-forwarded-for",
]  # fmt: skip


@pytest.mark.parametrize("name", FORWARDED)
async def test_what_a_proxy_passes_on_is_not_from_this_machine(name: str) -> None:
    async with keyless() as server:
        for value in ("127.0.0.1", "for=127.0.0.1", ""):
            answer = await server.http.get("/admin/cache", headers={name: value})
            assert answer.status_code == 403, value
            message = answer.json()["error"]["message"]
            assert name.lower() in message
            assert all(way in message for way in WAYS_OUT)
        # Requests for answers come by proxies all the time.
        answer = await server.http.post(CHAT, json=hello(), headers={name: "10.0.0.2"})
        assert answer.status_code == 200


async def test_another_machine_may_infer_and_scrape_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    address = own_address()
    async with keyless(http={"host": "0.0.0.0"}) as server:
        url = f"http://{address}:{server.address[1]}"
        async with httpx.AsyncClient(base_url=url) as stranger:
            assert (await stranger.post(CHAT, json=hello())).status_code == 200
            assert (await stranger.get("/metrics")).status_code == 200
            assert (await stranger.get("/health/ready")).status_code == 200
            for headers in ({}, {"host": "localhost"}, {"x-forwarded-for": "127.0.0.1"}):
                for path in ("/admin/cache", "/admin", "/admin/nothing", "/%61dmin/cache"):
                    answer = await stranger.get(path, headers=headers)
                    assert answer.status_code == 403, (path, headers)
                    error = answer.json()["error"]
                    assert error["kind"] == "forbidden"
                    assert all(way in error["message"] for way in WAYS_OUT)
        port = server.address[1]
        near = await server.http.get(f"http://127.0.0.1:{port}/admin/cache")
        assert near.status_code == 200
    outcomes = {line["outcome"] for line in request_lines(caplog)}
    assert "forbidden" in outcomes


async def test_everything_in_words_opens_everything_to_other_machines() -> None:
    address = own_address()
    async with keyless(without_keys="everything", http={"host": "0.0.0.0"}) as server:
        url = f"http://{address}:{server.address[1]}"
        async with httpx.AsyncClient(base_url=url) as stranger:
            forwarded = {"x-forwarded-for": "10.0.0.2", "host": "packhorse.internal"}
            assert (await stranger.get("/admin/cache", headers=forwarded)).status_code == 200
    hosts = {"host": "0.0.0.0", "allowed_hosts": ("packhorse.internal",)}
    async with keyless(without_keys="everything", http=hosts) as server:
        url = f"http://{address}:{server.address[1]}"
        async with httpx.AsyncClient(base_url=url) as stranger:
            assert (await stranger.get("/admin/cache")).status_code == 403
            named = {"host": "packhorse.internal"}
            assert (await stranger.get("/admin/cache", headers=named)).status_code == 200


async def test_a_port_of_their_own_is_for_operators_who_reach_it() -> None:
    address = own_address()
    async with keyless(http={"admin_port": 0, "admin_host": "0.0.0.0"}) as server:
        assert server.listeners.admin_url is not None
        port = server.listeners.admin_url.rpartition(":")[2]
        async with httpx.AsyncClient(base_url=f"http://{address}:{port}") as operator:
            assert (await operator.get("/admin/cache")).status_code == 200
            assert (await operator.get("/metrics")).status_code == 200
            # Whoever reaches it, but no web page, and not by any name.
            for headers in ({"origin": EVIL}, {"host": f"evil.example:{port}"}):
                answer = await operator.get("/admin/cache", headers=headers)
                assert answer.status_code == 403, headers
        assert (await server.http.get("/admin/cache")).status_code == 404


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (("127.0.0.1", 9), 200),
        (("127.8.9.10", 9), 200),
        (("::1", 9), 200),
        (("::ffff:127.0.0.1", 9), 200),
        (("10.0.0.9", 9), 403),
        (("::ffff:10.0.0.9", 9), 403),
        (("fe80::1%eth0", 9), 403),
        (("localhost", 9), 403),
        (("", 0), 403),
        (None, 403),  # a connection whose address was gone before it was asked for
    ],
)
async def test_this_machine_is_its_loopback_addresses(client: Any, status: int) -> None:
    settings = HttpSettings()
    cache = ResultCache(b"s" * 32, memory_bytes=2**20, max_entry_bytes=2**16, ttl_s=60)
    admin = Admin(cache=cache, model="echo")
    app = build_app(Pipeline(Models(Model("echo"))), settings, Keys(AuthSettings()), admin)
    transport = httpx.ASGITransport(app, client=client)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        assert (await http.get("/admin/cache")).status_code == status


async def flushed(target: Twins | grpc.aio.Channel, **metadata: str) -> Any:
    """The code; None for a refusal that leaves out a way."""
    channel = target.channel if isinstance(target, Twins) else target
    flush = channel.unary_unary(
        "/packhorse.v1.Admin/FlushCache",
        request_serializer=admin_pb2.FlushCacheRequest.SerializeToString,
        response_deserializer=admin_pb2.FlushCacheResponse.FromString,
    )
    names = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
    try:
        await flush(admin_pb2.FlushCacheRequest(), metadata=names)
    except grpc.aio.AioRpcError as error:
        missing = [way for way in WAYS_OUT if way not in error.details()]
        return None if missing and "origin" not in metadata else error.code()
    return grpc.StatusCode.OK


async def test_the_same_holds_over_grpc() -> None:
    address = own_address()
    refused = grpc.StatusCode.PERMISSION_DENIED
    async with twins(keys=AuthSettings(), cache=True, rpc={"host": "0.0.0.0"}) as both:
        port = both.rpc.address.rpartition(":")[2]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as near:
            assert await flushed(near) is grpc.StatusCode.OK
            for name in ("forwarded", "x_forwarded_for", "via", "x_real_ip"):
                assert await flushed(near, **{name: "127.0.0.1"}) is refused, name
            assert await flushed(near, origin=EVIL) is refused
        async with grpc.aio.insecure_channel(f"{address}:{port}") as far:
            assert await flushed(far) is refused
            name = "/packhorse.v1.Inference/ListModels"
            ask = far.unary_unary(
                name,
                request_serializer=inference_pb2.ListModelsRequest.SerializeToString,
                response_deserializer=inference_pb2.ListModelsResponse.FromString,
            )
            assert (await ask(inference_pb2.ListModelsRequest())).models
            assert not isinstance(await Twins(both.served, both.rpc, far).ask(*chat()), Failed)


async def test_everything_in_words_holds_over_grpc() -> None:
    address = own_address()
    auth = AuthSettings(without_keys="everything")
    async with twins(keys=auth, cache=True, rpc={"host": "0.0.0.0"}) as both:
        port = both.rpc.address.rpartition(":")[2]
        async with grpc.aio.insecure_channel(f"{address}:{port}") as far:
            assert await flushed(far, x_forwarded_for="10.0.0.2") is grpc.StatusCode.OK
            assert await flushed(far, origin=EVIL) is grpc.StatusCode.PERMISSION_DENIED


async def test_grpc_over_ipv6_loopback_is_this_machine() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    async with twins(keys=AuthSettings(), cache=True, rpc={"host": "::1"}) as both:
        assert await flushed(both) is grpc.StatusCode.OK
        assert await flushed(both, via="1.1 proxy") is grpc.StatusCode.PERMISSION_DENIED
