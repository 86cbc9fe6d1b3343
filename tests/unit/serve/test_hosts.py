"""Hosts and origins as text."""

from __future__ import annotations

import pytest

from packhorse.serve.settings.hosts import is_loopback, is_origin, is_same_origin, parse_host
from packhorse.serve.settings.http import HttpSettings

ORIGINS = [
    "https://chat.example.org", "http://localhost:3000", "https://xn--bcher-kva.example",
    "http://127.0.0.1:8080", "http://[::1]:8080", "https://a.b:80", "http://a.b:443",
    "app://obsidian.md", "tauri://localhost", "https://tauri.localhost", "capacitor://localhost",
    "chrome-extension://abcdefghijklmnop", "moz-extension://1b671a64-40d5-491e-99b0-da01ff1f3341",
    "safari-web-extension://2E6E1D3C-40D5-491E-99B0-DA01FF1F3341", "vscode-webview://0a1b2c",
    "ionic://localhost", "file://", "null",
]  # fmt: skip
NO_ORIGINS = [
    "", "chat.example.org", "https://", "https://a.b/", "https://a.b/path", "app://obsidian.md/",
    "chrome-extension://abc/*", "https://a.b?x", "https://a.b#x", "https://user@a.b",
    "https://a b", " https://a.b", "https://a.b\n", "https://*.a.b", "https://a.b:port",
    "https://a.b:443", "http://a.b:80", "https://Chat.Example.org", "HTTPS://a.b", "NULL",
    "://a.b", "1app://x", "file:///x", "https://bücher.example", "https://a.b,https://c.d", "**",
]  # fmt: skip


@pytest.mark.parametrize("origin", ORIGINS)
def test_every_serialised_origin_can_be_named(origin: str) -> None:
    assert is_origin(origin)
    assert HttpSettings(cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.parametrize("origin", NO_ORIGINS)
def test_what_no_browser_sends_is_refused_with_the_way_to_write_it(origin: str) -> None:
    with pytest.raises(ValueError, match=r"write SCHEME://HOST\[:PORT\] without a path"):
        HttpSettings(cors_origins=(origin,))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("localhost", ("localhost", None)),
        ("LocalHost:80", ("localhost", 80)),
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("[::1]", ("::1", None)),
        ("[0:0:0:0:0:0:0:1]:9", ("::1", 9)),
        ("a_b-c.d", ("a_b-c.d", None)),
        ("", None),
        ("a b", None),
        ("user@localhost", None),
        ("localhost/x", None),
        ("localhost:", None),
        ("localhost:8000:1", None),
        ("localhost:123456", None),
        ("::1", None),
        ("[::1", None),
        ("localhost\n", None),
        ("*", None),
    ],
)
def test_a_host_is_a_name_and_perhaps_a_port(
    text: str, parsed: tuple[str, int | None] | None
) -> None:
    assert parse_host(text) == parsed
    if parsed is None:
        with pytest.raises(ValueError, match="is no host"):
            HttpSettings(allowed_hosts=(text,))


@pytest.mark.parametrize(
    ("origin", "scheme", "host", "is_same"),
    [
        ("http://localhost:8000", "http", "localhost:8000", True),
        ("http://localhost", "http", "LOCALHOST:80", True),
        ("https://a.b", "https", "a.b:443", True),
        ("http://[::1]:8000", "http", "[0::1]:8000", True),
        ("http://localhost:8000", "https", "localhost:8000", False),
        ("http://localhost:8001", "http", "localhost:8000", False),
        ("http://localhost", "http", "localhost:8000", False),
        ("http://localhost:8000/", "http", "localhost:8000", False),
        ("null", "http", "localhost:8000", False),
        ("", "http", "", False),
    ],
)
def test_a_page_is_the_servers_own_by_scheme_host_and_port(
    origin: str, scheme: str, host: str, *, is_same: bool
) -> None:
    assert is_same_origin(origin, scheme, host) is is_same


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True), ("127.255.0.3", True), ("::1", True), ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("::ffff:10.0.0.1", False),
        ("localhost", False), ("", False), ("127.1", False), ("fe80::1%lo", False),
    ],
)  # fmt: skip
def test_loopback_is_an_address(address: str, *, expected: bool) -> None:
    assert is_loopback(address) is expected
