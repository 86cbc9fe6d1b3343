"""gRPC over the echo engine: the same table of requests as HTTP, and what only gRPC has."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from packhorse.serve.api.admin import Admin
from packhorse.serve.errors import StartupError
from packhorse.serve.rpc.pb import admin_pb2
from packhorse.serve.rpc.pb import inference_pb2 as pb
from packhorse.serve.rpc.server import RpcServer
from packhorse.serve.settings.rpc import RpcSettings
from tests.client import CHAT, TEXT
from tests.integration.grpc_serving import chat, text, twins
from tests.integration.serving import Held, bearer, until, write_keys
from tests.protocol_parity import (
    Failed,
    as_message,
    metadata,
    method,
)

GOOD = [
    chat(),
    chat(stream=True),
    chat(n=3, temperature=1.0),
    chat(n=3, temperature=1.0, stream=True),
    chat(max_tokens=2),
    chat("Ünïcode 漢字 🐴"),
    text(),
    text(stream=True),
    text(["a b", "c d e"]),
    text(["a b", "c d e"], n=2, temperature=1.0, stream=True),
    text([5, 6, 7]),
    text([[5, 6], [7]]),
    text(echo=True),
    text(return_token_ids=True),
    text(logit_bias={"5": 1.5}, stop=["x"], seed=-3, top_k=-1),
]
BAD = [
    chat(model="other"),
    chat(temperature=9.5),
    chat(n=0),
    chat(top_p=1.5),
    chat(max_tokens=0),
    chat(timeout_s=1e9),
    chat(tool_choice="required"),
    chat(logprobs=False, top_logprobs=2),
    chat("w " * 3000),
    chat("!dead"),
    chat("!bug"),
    chat(""),
    chat(cache={"mode": "sometimes"}),
    chat(min_tokens=5, max_tokens=3),
    chat(reasoning_effort="enormous"),
    (CHAT, {"model": "echo", "messages": []}),
    (CHAT, {"model": "echo", "messages": [{"role": "oracle!", "content": "x"}]}),
    (CHAT, {"model": "echo", "messages": [{"role": "user"}]}),
    (TEXT, {"model": "echo"}),
    text(""),
    text(["a", ""]),
    text(n=129),
    text(seed=2**63 - 1, n=2, temperature=1.0),
    text(repetition_penalty=10.5),
    text(allowed_token_ids=[2**31]),
    text(prompt_logprobs=0, stream=True),
]


@pytest.mark.parametrize(("path", "body"), GOOD, ids=lambda value: str(value)[:60])
async def test_good_requests_are_answered_alike(path: str, body: dict[str, Any]) -> None:
    async with twins() as both:
        over_http = await both.ask_http(path, body)
        assert await both.ask(path, body) == over_http
        assert over_http.choices[0].text


@pytest.mark.parametrize(("path", "body"), BAD, ids=lambda value: str(value)[:60])
async def test_bad_requests_are_refused_alike(path: str, body: dict[str, Any]) -> None:
    async with twins() as both:
        over_http = await both.ask_http(path, body)
        refused = await both.ask(path, body)
        assert isinstance(refused, Failed), refused
        assert (refused.kind, refused.message) == (over_http.kind, over_http.message)
        assert refused.param == over_http.param
        assert refused.openai == over_http.openai
        assert refused.openai is not None
        assert (await both.ask(*chat())).choices[0].text == "one two three"
        assert await both.served.pipeline.drain(10)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (chat(model="x"), "NOT_FOUND"),
        (chat(n=0), "INVALID_ARGUMENT"),
        (chat("!dead"), "UNAVAILABLE"),
        (chat("!bug"), "INTERNAL"),
        (chat("!dead-later", stream=True), "UNAVAILABLE"),
        (chat("!bug-later", stream=True), "INTERNAL"),
    ],
    ids=str,
)
async def test_codes(body: tuple[str, dict[str, Any]], code: str) -> None:
    async with twins() as both:
        assert (await both.ask(*body)).code == code


async def test_zero_is_not_unset() -> None:
    async with twins(cache=True) as both:
        assert not pb.Options().HasField("temperature")
        await both.ask(*chat())
        await both.ask(*chat(temperature=0))
        call = method(both.channel, "Chat")(as_message(*chat(temperature=0))[1])
        await call
        assert dict(await call.trailing_metadata())["x-packhorse-cache"] == "hit"


async def test_one_cache_for_both() -> None:
    async with twins(cache=True) as both:
        await both.ask_http(*chat(temperature=0))
        for body, mark in (
            (chat(temperature=0, stream=True), "hit"),
            (chat(temperature=0, cache={"mode": "off"}), "bypass"),
            (chat(temperature=1), "bypass"),
            (chat("new", temperature=0), "miss"),
        ):
            name, message = as_message(*body)
            call = method(both.channel, name)(message)
            if name == "Chat":
                await call
            else:
                assert [chunk async for chunk in call]
            assert dict(await call.trailing_metadata())["x-packhorse-cache"] == mark


async def test_request_ids() -> None:
    async with twins() as both:
        for sent, expected in (("mine-1", "mine-1"), ("not harmless", None)):
            call = method(both.channel, "Chat")(
                as_message(*chat())[1], metadata=(("x-request-id", sent),)
            )
            answer = await call
            given = dict(await call.trailing_metadata())["x-request-id"]
            assert answer.id == "chatcmpl-" + given
            assert (given == expected) if expected else len(given) == 32


async def test_keys(tmp_path: Path) -> None:
    keys = write_keys(
        tmp_path / "keys.yaml",
        user={"quotas": {"requests_per_minute": 2}},
        op={"scopes": ["admin"]},
    )
    async with twins(keys=keys, cache=True) as both:
        assert (await both.ask(*chat())).code == "UNAUTHENTICATED"
        assert (await both.ask(*chat(), authorization="Bearer wrong-key")).code == "UNAUTHENTICATED"
        assert (await both.ask(*chat(), **bearer("op"))).code == "PERMISSION_DENIED"
        for _ in range(2):
            assert (await both.ask(*chat(temperature=0), **bearer("user"))).choices
        spent = await both.ask(*chat(), **bearer("user"))
        assert (spent.code, spent.kind) == ("RESOURCE_EXHAUSTED", "overloaded")
        assert 1 < spent.retry_s <= 31
        flush = both.channel.unary_unary(
            "/packhorse.v1.Admin/FlushCache",
            request_serializer=admin_pb2.FlushCacheRequest.SerializeToString,
            response_deserializer=admin_pb2.FlushCacheResponse.FromString,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await flush(admin_pb2.FlushCacheRequest(), metadata=metadata(bearer("user")))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        dry = admin_pb2.FlushCacheRequest(tenant="user", dry_run=True)
        found = await flush(dry, metadata=metadata(bearer("op")))
        assert (found.flushed, found.memory_entries) == (False, 1)
        assert not found.HasField("store_entries")
        gone = await flush(
            admin_pb2.FlushCacheRequest(model="echo"), metadata=metadata(bearer("op"))
        )
        assert (gone.flushed, gone.memory_entries) == (True, 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await flush(admin_pb2.FlushCacheRequest(model="other"), metadata=metadata(bearer("op")))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_admin_without_adapters() -> None:
    async with twins() as both:
        for name, request in (
            ("ListAdapters", admin_pb2.ListAdaptersRequest()),
            ("GetAdapter", admin_pb2.GetAdapterRequest(name="x")),
            ("PutAdapter", admin_pb2.PutAdapterRequest(name="x", path="/x")),
            ("PinAdapter", admin_pb2.PinAdapterRequest(name="x")),
            ("RemoveAdapter", admin_pb2.RemoveAdapterRequest(name="x")),
            ("ListRoutings", admin_pb2.ListRoutingsRequest()),
            ("ReloadRoutes", admin_pb2.ReloadRoutesRequest()),
            ("RollBackRoutes", admin_pb2.RollBackRoutesRequest()),
            ("FlushCache", admin_pb2.FlushCacheRequest()),
        ):
            call = both.channel.unary_unary(
                f"/packhorse.v1.Admin/{name}",
                request_serializer=lambda message: message.SerializeToString(),
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(request)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND, name


async def test_admin_can_be_elsewhere() -> None:
    async with twins() as both:
        rpc = RpcServer(both.served.pipeline, None, None, RpcSettings(port=0))
        await rpc.start()
        async with grpc.aio.insecure_channel(rpc.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/packhorse.v1.Admin/FlushCache")(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert (await method(channel, "Chat")(as_message(*chat())[1])).choices
        await rpc.stop(0)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "\\ud800"}', '{"\\ud800": 1}'])
async def test_json_that_is_none(text: str) -> None:
    async with twins(cache=True) as both:
        request = as_message(*chat())[1]
        request.tools.add(name="f", parameters_json=text)
        refused = await both.send("Chat", request)
        assert (refused.code, refused.param) == ("INVALID_ARGUMENT", "tools.0.parameters_json")
        request = as_message(*chat(temperature=1))[1]
        request.chat_template_kwargs_json = text
        refused = await both.send("Chat", request)
        assert (refused.code, refused.param) == ("INVALID_ARGUMENT", "chat_template_kwargs_json")


async def test_the_small_methods() -> None:
    async with twins() as both:
        models = await method(both.channel, "ListModels", pb.ListModelsResponse)(
            pb.ListModelsRequest()
        )
        assert [model.id for model in models.models] == ["echo"]
        tokenize = method(both.channel, "Tokenize", pb.TokenizeResponse)
        of_text = await tokenize(pb.TokenizeRequest(prompt="a b", return_token_strs=True))
        assert of_text.count == len(of_text.tokens) == len(of_text.token_strs) == 2
        talk = pb.Conversation(messages=[pb.Message(role="user", content="a b")])
        assert (await tokenize(pb.TokenizeRequest(conversation=talk))).tokens == of_text.tokens
        detokenize = method(both.channel, "Detokenize", pb.DetokenizeResponse)
        assert (await detokenize(pb.DetokenizeRequest(tokens=[3, 4]))).prompt == "3 4"
        route = await method(both.channel, "Route", pb.RouteResponse)(as_message(*chat())[1])
        assert (route.model, route.stage, route.HasField("adapter")) == ("echo", "explicit", False)


async def read_all(call: Any) -> list[Any]:
    return [chunk async for chunk in call]


async def test_deadlines() -> None:
    async with twins(delay_s=600) as both:
        for name in ("Chat", "ChatStream"):
            call = method(both.channel, name)(as_message(*chat())[1], timeout=1)
            await until(lambda: both.served.engine.running == 1)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call if name == "Chat" else read_all(call))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: both.served.engine.running == 0)
        assert both.served.engine.aborted == 2
        late = await both.ask(*chat("a b c d", timeout_s=0.1))
        assert (late.code, late.kind) == ("DEADLINE_EXCEEDED", "deadline")
        assert "0.1 s" in late.message
    async with twins() as both:  # a call that may take longer than the server gives is no error
        answer = await method(both.channel, "Chat")(as_message(*chat())[1], timeout=100_000)
        assert answer.choices


async def test_overload() -> None:
    engine = Held()
    async with twins(engine=engine, limits={"max_in_engine": 2}) as both:
        busy = [asyncio.create_task(both.ask(*chat("a b", n=1, user=str(n)))) for n in range(2)]
        await until(lambda: both.served.pipeline.admission.running == 2)
        refused = await both.ask(*chat())
        http = await both.ask_http(*chat())
        assert (refused.code, refused.kind) == ("RESOURCE_EXHAUSTED", http.kind)
        assert refused.retry_s >= 1
        engine.go.set()
        for task in busy:
            assert (await task).choices


async def test_health_follows_readiness() -> None:
    async with twins() as both:
        stub = health_pb2_grpc.HealthStub(both.channel)
        for name in ("", "packhorse.v1.Inference"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watching = stub.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        both.served.engine.dead = True
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        both.served.engine.dead = False
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        both.served.pipeline.stop_admitting()
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        refused = await both.ask(*chat())
        assert (refused.code, refused.kind) == ("UNAVAILABLE", "unavailable")
        watching.cancel()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls(authority: trustme.CA, tmp_path: Path, mutual: bool) -> None:
    server, client = authority.issue_cert("localhost"), authority.issue_cert("client")
    server.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "cert.pem").write_bytes(b"".join(c.bytes() for c in server.cert_chain_pems))
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls: dict[str, Any] = {
        "tls_key": tmp_path / "key.pem",
        "tls_certificate": tmp_path / "cert.pem",
    }
    if mutual:
        tls["client_ca"] = tmp_path / "ca.pem"
    async with twins(rpc=tls) as both:
        port = both.rpc.address.rpartition(":")[2]
        roots = authority.cert_pem.bytes()
        chain = b"".join(c.bytes() for c in client.cert_chain_pems)
        with_certificate = grpc.ssl_channel_credentials(
            roots, client.private_key_pem.bytes(), chain
        )
        without = grpc.ssl_channel_credentials(roots)
        for credentials, served in ((with_certificate, True), (without, not mutual)):
            async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
                call = method(channel, "Chat")(as_message(*chat())[1], timeout=10)
                if served:
                    assert (await call).choices
                else:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call


async def test_what_cannot_be_listened_on(tmp_path: Path) -> None:
    async with twins() as both:
        port = int(both.rpc.address.rpartition(":")[2])
        admin = Admin()
        with pytest.raises(StartupError, match="gRPC"):
            RpcServer(both.served.pipeline, admin, None, RpcSettings(port=port))
        files = {"tls_key": tmp_path / "none", "tls_certificate": tmp_path / "none"}
        with pytest.raises(StartupError, match="none cannot be read"):
            RpcServer(both.served.pipeline, admin, None, RpcSettings(port=0, **files))
        (tmp_path / "none").write_text("no certificate")
        with pytest.raises(StartupError, match="certificate"):
            RpcServer(both.served.pipeline, admin, None, RpcSettings(port=0, **files))
