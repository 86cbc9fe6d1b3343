"""Keys, scopes, listeners, TLS and CORS, over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from openai import AsyncOpenAI, AuthenticationError

from packhorse.serve.errors import StartupError
from packhorse.serve.rest.server import Listeners
from packhorse.serve.settings.http import HttpSettings
from tests.client import CHAT, hello, request_lines
from tests.conftest import BIN, running_server
from tests.integration.serving import bearer, serving, write_keys

SCOPED = {
    "user": {"scopes": ["inference"]},
    "scraper": {"scopes": ["metrics"]},
    "operator": {"scopes": ["admin", "metrics", "inference"]},
}


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


ROUTES = [
    ("POST", CHAT, None, 401),
    ("POST", CHAT, "nobody", 401),
    ("POST", CHAT, "scraper", 403),
    ("POST", CHAT, "user", 200),
    ("POST", "/tokenize", None, 401),
    ("GET", "/v1/models", None, 401),
    ("GET", "/v1/models", "user", 200),
    ("GET", "/version", "nobody", 401),
    ("GET", "/openapi.json", None, 401),
    ("GET", "/openapi.json", "user", 200),
    ("GET", "/v1/nothing", None, 401),
    ("GET", "/v1/nothing", "user", 404),
    ("GET", "/", None, 401),
    ("GET", "/metrics", None, 401),
    ("GET", "/metrics", "user", 403),
    ("GET", "/metrics", "scraper", 200),
    ("GET", "/admin", "user", 403),
    ("GET", "/admin/anything", "scraper", 403),
    ("GET", "/admin/anything", "user", 403),
    ("GET", "/admin/anything", "operator", 404),
    ("GET", "/health/live", None, 200),
    ("GET", "/health/ready", None, 200),
    ("GET", "/health", None, 200),
    ("GET", "/health/../metrics", None, 401),
    ("GET", "/healthy", None, 401),
    ("OPTIONS", CHAT, None, 401),
]


async def test_every_route_but_health_needs_a_key_with_its_scope(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", **SCOPED)
    async with serving(keys=keys) as server:
        for method, path, key, status in ROUTES:
            headers = bearer(key) if key else {}
            body = hello() if method == "POST" else None
            response = await server.http.request(method, path, headers=headers, json=body)
            assert response.status_code == status, (method, path, key)
            assert response.headers["x-request-id"]
            assert ("www-authenticate" in response.headers) == (status == 401)
            if status in (401, 403):
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code", "kind"}
                assert error["kind"] == {401: "unauthenticated", 403: "forbidden"}[status]


async def test_the_official_client_uses_its_api_key(tmp_path: Path) -> None:
    async with serving(keys=write_keys(tmp_path / "keys.yaml", **SCOPED)) as server:
        messages: Any = [{"role": "user", "content": "one two"}]
        for key in ("key-user", "key-wrong"):
            client = AsyncOpenAI(base_url=server.listeners.url + "/v1", api_key=key, max_retries=0)
            call = client.chat.completions.create(model="echo", messages=messages)
            if key == "key-user":
                assert (await call).choices[0].message.content == "one two"
            else:
                with pytest.raises(AuthenticationError):
                    await call
            await client.close()


async def test_a_key_that_is_revoked_while_it_streams_ends_with_that_stream(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "keys.yaml"
    keys = write_keys(path, user={}, other={})
    async with serving(keys=keys, clock=clock, delay_s=0.02) as server:
        asked = {"json": hello("a b c d", stream=True), "headers": bearer("user")}
        async with server.http.stream("POST", CHAT, **asked) as stream:
            assert stream.status_code == 200
            write_keys(path, other={})
            clock.now_s = 2.0
            assert (await server.http.post(CHAT, **asked)).status_code == 401
            text = (await stream.aread()).decode()
        assert '"finish_reason": "stop"' in text
        assert text.endswith("data: [DONE]\n\n")
        assert (await server.http.get("/v1/models", headers=bearer("other"))).status_code == 200


async def test_keys_and_hashes_never_reach_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore").setLevel(logging.WARNING)  # the client's own
    path = tmp_path / "keys.yaml"
    async with serving(keys=write_keys(path, **SCOPED)) as server:
        for key in ("user", "scraper", "nobody"):
            await server.http.post(CHAT, json=hello(), headers=bearer(key))
    lines = [(line["key"], line["tenant"], line["outcome"]) for line in request_lines(caplog)]
    assert lines == [
        ("user", "user", "ok"),
        ("scraper", "scraper", "forbidden"),
        ("-", "anonymous", "unauthenticated"),
    ]
    assert "key-" not in caplog.text
    assert all(word not in caplog.text for word in path.read_text().split() if len(word) == 64)


def test_the_command_line_takes_a_keys_file(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", **SCOPED)
    arguments = ("--engine", "echo", "--api-keys", str(keys.keys_file))
    with running_server(tmp_path, *arguments) as server:
        assert httpx.get(server.url + "/v1/models").status_code == 401
        assert httpx.get(server.url + "/v1/models", headers=bearer("user")).status_code == 200
        assert "3 API keys from" in server.log()


def test_keys_of_the_environment_may_end_with_a_line(tmp_path: Path) -> None:
    """What `echo KEY | base64` leaves in a Secret."""
    key, admin_key = "ph-0123456789abcdef", "ph-operators-0123456789"
    environment = {
        "PACKHORSE_AUTH__API_KEY": f"{key}\n",
        "PACKHORSE_AUTH__ADMIN_KEY": f" {admin_key}\r\n",
    }
    with running_server(tmp_path, "--engine", "echo", environment=environment) as server:
        for sent, path, status in [
            (None, "/v1/models", 401), (key, "/v1/models", 200), (admin_key, "/v1/models", 200),
            (key, "/metrics", 200), (key, "/admin/cache", 403), (admin_key, "/admin/routes", 404),
        ]:  # fmt: skip
            headers = {"authorization": f"Bearer {sent}"} if sent else {}
            answer = httpx.get(server.url + path, headers=headers)
            assert answer.status_code == status, (sent, path)
            if status == 403:
                assert "auth.admin_key" in answer.json()["error"]["message"]
        log = server.log()
        for name in ("auth.api_key", "auth.admin_key"):
            assert f"{name} has white space or an end of line around it" in log
        assert key not in log
        # And on the client's side: this server has no routes, which it says to known keys alone.
        asked = subprocess.run(
            [BIN / "packhorse", "route", "a question", "--url", server.url],
            env={**os.environ, "OPENAI_API_KEY": f"{key}\n"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"{server.url} answered 40" in asked.stderr.replace("\n", " ")
        assert "unauthenticated" not in asked.stderr


async def test_one_request_id_end_to_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving() as server:
        response = await server.http.post(CHAT, json=hello(), headers={"x-request-id": "abc-9"})
    assert response.headers["x-request-id"] == "abc-9"
    assert response.json()["id"] == "chatcmpl-abc-9"
    (line,) = request_lines(caplog)
    assert (line["request_id"], line["model"]) == ("abc-9", "echo")


async def test_operators_may_have_a_port_of_their_own(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", **SCOPED)
    async with serving(keys=keys, http={"admin_port": 0}) as server:
        own = server.listeners.admin_url
        assert own is not None
        assert own != server.listeners.url
        for url, path, key, status in [
            ("", "/metrics", "operator", 404),
            ("", CHAT, "user", 405),
            ("", "/health/live", "user", 200),
            (own, "/metrics", "scraper", 200),
            (own, "/metrics", "user", 403),
            (own, "/health/ready", "user", 200),
            (own, CHAT, "user", 404),
        ]:
            response = await server.http.get(url + path, headers=bearer(key))
            assert response.status_code == status, (url, path)
        assert (await server.http.get(own + "/metrics")).status_code == 401
        document = (await server.http.get("/openapi.json", headers=bearer("user"))).json()
        assert "/metrics" not in document["paths"]
        assert CHAT in document["paths"]


async def test_both_listeners_stop(tmp_path: Path) -> None:
    async with serving(http={"admin_port": 0}) as server:
        urls = [server.listeners.url, server.listeners.admin_url]
    async with httpx.AsyncClient() as http:
        for url in urls:
            with pytest.raises(httpx.ConnectError):
                await http.get(f"{url}/health/live")


def taken_port() -> tuple[socket.socket, int]:
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, listener.getsockname()[1]


def test_a_port_that_is_taken_is_named_and_the_other_one_given_back() -> None:
    listener, port = taken_port()
    with listener:
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}: .*--host or --port"):
            Listeners(HttpSettings(port=port), _nothing)
        with pytest.raises(StartupError, match=r"another http\.admin_host or http\.admin_port"):
            Listeners(HttpSettings(port=0, admin_port=port), _nothing, _nothing)


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """An app that is never called."""


@dataclass
class Certificate:
    authority: trustme.CA
    settings: dict[str, Any]

    @property
    def trusted(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    made.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    made.private_key_pem.write_to_path(tmp_path / "server.key")
    settings = {"tls_certificate": tmp_path / "server.pem", "tls_key": tmp_path / "server.key"}
    return Certificate(authority, settings)


async def test_tls_on_both_ports(certificate: Certificate) -> None:
    options = {**certificate.settings, "admin_port": 0}
    async with serving(http=options, verify=certificate.trusted) as server:
        assert server.listeners.url.startswith("https://")
        response = await server.http.post(CHAT, json=hello("a b", stream=True))
        assert response.text.endswith("data: [DONE]\n\n")
        assert (await server.http.get(f"{server.listeners.admin_url}/metrics")).status_code == 200
        async with httpx.AsyncClient() as stranger:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.get(server.listeners.url + "/health/live")


def test_a_certificate_that_cannot_be_used_is_a_start_up_error(
    certificate: Certificate, tmp_path: Path
) -> None:
    good = certificate.settings
    (tmp_path / "wrong.key").write_text("no key")
    other = trustme.CA().issue_cert("127.0.0.1")
    other.private_key_pem.write_to_path(tmp_path / "other.key")
    for key, message in [
        ("none.key", "tls_key = .*none.key: no such file"),
        ("wrong.key", "not a PEM certificate chain"),
        ("other.key", "not a PEM certificate chain"),
    ]:
        with pytest.raises(StartupError, match=message):
            Listeners(HttpSettings(**{**good, "port": 0, "tls_key": tmp_path / key}), _nothing)
    with pytest.raises(ValueError, match="set both, or neither"):
        HttpSettings(tls_certificate=good["tls_certificate"])


ORIGIN = "https://chat.example.org"


async def test_a_web_page_of_an_allowed_origin_may_call(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", **SCOPED)
    async with serving(keys=keys, http={"cors_origins": (ORIGIN,)}) as server:
        preflight = {
            "origin": ORIGIN,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-os",
        }
        response = await server.http.options(CHAT, headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in response.headers["access-control-allow-headers"]
        asked = {"origin": ORIGIN, **bearer("user")}
        for stream in (False, True):
            response = await server.http.post(CHAT, json=hello(stream=stream), headers=asked)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == ORIGIN
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        refused = await server.http.post(CHAT, json=hello(), headers={"origin": ORIGIN})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ORIGIN
        stranger = {**preflight, "origin": "https://elsewhere.example.org"}
        response = await server.http.options(CHAT, headers=stranger)
        assert response.status_code == 400
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "origin",
    ["app://obsidian.md", "chrome-extension://abcdefghijklmnop", "tauri://localhost", "null"],
)
async def test_apps_and_extensions_may_be_named_and_call(tmp_path: Path, origin: str) -> None:
    keys = write_keys(tmp_path / "keys.yaml", **SCOPED)
    async with serving(keys=keys, http={"cors_origins": (origin,)}) as server:
        preflight = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        response = await server.http.options(CHAT, headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin
        asked = {"origin": origin, **bearer("user")}
        response = await server.http.post(CHAT, json=hello(), headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin
        scheme, _, host = origin.partition("://")
        for other in (f"{scheme}://other", f"https://{host or origin}"):
            response = await server.http.options(CHAT, headers={**preflight, "origin": other})
            assert response.status_code == 400, other
            assert "access-control-allow-origin" not in response.headers


async def test_an_unsent_body_does_not_hold_a_refusal_back(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", **SCOPED)
    async with serving(keys=keys) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n\r\n".encode())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert b"401 Unauthorized" in head
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        assert json.loads(await reader.readexactly(length))["error"]["kind"] == "unauthenticated"
        writer.close()
