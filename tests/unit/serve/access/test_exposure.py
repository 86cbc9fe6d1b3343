"""Servers without keys: where they may listen, and whose operators' calls they answer."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from packhorse.serve.access.exposure import UNIX, Exposure, Sender, check_listeners
from packhorse.serve.errors import Forbidden, StartupError
from packhorse.serve.metrics import ServerMetrics
from packhorse.serve.settings.auth import AuthSettings
from packhorse.serve.settings.http import HttpSettings
from packhorse.serve.settings.rpc import RpcSettings

LOOPBACK = AuthSettings(without_keys="loopback")
KEY = SecretStr("ph-0123456789abcdef")
HERE = Sender("127.0.0.1", [("host", "localhost:8000")])


@pytest.mark.parametrize(
    ("http", "rpc", "named"),
    [
        ({}, {}, None),
        ({"host": "localhost"}, {"host": "::1", "port": 0}, None),
        ({"host": "127.0.0.2", "admin_port": 0}, {}, None),
        ({"admin_host": "0.0.0.0"}, {"host": "0.0.0.0"}, None),  # neither is listened on
        ({"host": "0.0.0.0"}, {}, "http.host 0.0.0.0"),
        ({"host": "::"}, {}, "http.host ::"),
        ({"host": ""}, {}, "http.host"),
        ({"host": "packhorse.internal"}, {}, "http.host packhorse.internal"),
        ({"admin_host": "10.0.0.1", "admin_port": 0}, {}, "http.admin_host 10.0.0.1"),
        ({}, {"host": "0.0.0.0", "port": 0}, "rpc.host 0.0.0.0"),
    ],
)
def test_loopback_alone_is_listened_on(
    http: dict[str, Any], rpc: dict[str, Any], named: str | None
) -> None:
    settings = HttpSettings(**http), RpcSettings(**rpc)
    for other in (
        AuthSettings(),
        AuthSettings(without_keys="everything"),
        AuthSettings(without_keys="loopback", api_key=KEY),
        AuthSettings(without_keys="loopback", admin_key=KEY),
    ):
        check_listeners(other, *settings)
    if named is None:
        check_listeners(LOOPBACK, *settings)
    else:
        with pytest.raises(StartupError, match=named) as caught:
            check_listeners(LOOPBACK, *settings)
        for way in ("auth.keys_file", "PACKHORSE_AUTH__WITHOUT_KEYS=inference", "127.0.0.1"):
            assert way in str(caught.value)


@pytest.mark.parametrize("without_keys", ["loopback", "inference"])
@pytest.mark.parametrize(
    ("sender", "reason"),
    [
        (HERE, None),
        (Sender("::1", []), None),
        (Sender(UNIX, []), None),
        (Sender("10.0.0.9", HERE.headers), "remote"),
        (Sender(None, HERE.headers), "remote"),
        (Sender("127.0.0.1", [("x-forwarded-for", "")]), "forwarded"),
        (Sender("127.0.0.1", [("cf-ray", "1")]), "forwarded"),
        (Sender("127.0.0.1", [("host", "evil.example:8000")]), "host"),
        (Sender("127.0.0.1", [("host", "localhost"), ("host", "evil.example")]), "host"),
        (Sender("127.0.0.1", [*HERE.headers, ("origin", "http://evil.example")]), "origin"),
        (Sender("127.0.0.1", [*HERE.headers, ("origin", "null")]), "origin"),
        (Sender("127.0.0.1", [("origin", "http://localhost:8000")]), "origin"),
        (Sender("127.0.0.1", [*HERE.headers, ("origin", "http://localhost:8000")]), None),
        (Sender("127.0.0.1", [*HERE.headers, ("origin", "app://own"), ("origin", "x")]), "origin"),
        (Sender("127.0.0.1", [*HERE.headers, ("origin", "app://own")]), None),
    ],
)
def test_each_refusal_is_counted_by_its_reason(
    without_keys: Any, sender: Sender, reason: str | None
) -> None:
    metrics = ServerMetrics()
    origins = ("*", "null", "app://own")
    exposure = Exposure(without_keys, cors_origins=origins, metrics=metrics)
    if reason is None:
        exposure.check(sender)
        return
    with pytest.raises(Forbidden, match=r"[Ww]ithout keys|auth\.admin_key"):
        exposure.check(sender)
    assert metrics.auth_failures.labels(reason)._value.get() == 1


def test_operators_own_listener_is_known_by_its_addresses() -> None:
    exposure = Exposure("inference", own_listener="ops.internal")
    for host in ("ops.internal:9000", "10.0.0.2:9000", "localhost:9000"):
        exposure.check(Sender("10.0.0.9", [("host", host)], arrived_at="10.0.0.2"))
    for host in ("10.0.0.3:9000", "evil.example"):
        with pytest.raises(Forbidden, match=r"http\.allowed_hosts"):
            exposure.check(Sender("10.0.0.9", [("host", host)], arrived_at="10.0.0.2"))


def test_a_long_host_is_not_repeated_in_full() -> None:
    sender = Sender("127.0.0.1", [("host", "a" * 5000)])
    with pytest.raises(Forbidden) as caught:
        Exposure("inference").check(sender)
    assert len(caught.value.message) < 500
