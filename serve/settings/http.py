"""Settings of the HTTP listeners (rest/)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from packhorse.serve.settings.hosts import is_origin, parse_host
from packhorse.serve.settings.section import Section


class HttpSettings(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 lets the system choose; the start-up line says which."""
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Larger request bodies are refused with 413 before they are read whole."""
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """Unknown fields of requests are ignored and listed in the header x-packhorse-ignored, or
    refused with 400. Known fields that would change the answer are always refused.
    """
    stalled_client_timeout_s: float = Field(60.0, gt=0)
    """A client that reads nothing of its stream, or does not finish its request, for this long is
    disconnected.
    """
    heartbeat_s: float | None = Field(15.0, gt=0)
    """A stream that was silent for this long sends an SSE comment, also before its first token:
    many proxies close connections that are silent for a minute. null: never.
    """
    keep_alive_s: int = Field(75, ge=1)
    """An idle connection is closed after this long. It must exceed the load balancer's idle timeout
    (60 s for most): else the balancer may send a request into a connection that is closing.
    """
    max_connections: int = Field(4096, ge=1)
    """Limit over all ports. A connection above it replaces the one that was silent for longest; if
    every connection has a request in progress, the new one gets 503.
    """
    header_timeout_s: float = Field(20.0, gt=0)
    """Time limit for the headers of a request, from the connection's opening or from the first byte
    after an answer. The TLS handshake has the same limit of its own.
    """
    max_header_bytes: int = Field(64 * 1024, ge=1024)
    """A request with larger headers gets 431, and its connection is closed."""
    admin_port: int | None = Field(None, ge=0, le=65535)
    """A second port for /metrics and /admin, which are then not on the first one."""
    admin_host: str = "127.0.0.1"
    """Address of admin_port."""
    tls_certificate: Path | None = None
    """PEM file with the certificate chain; both ports then serve https instead of http."""
    tls_key: Path | None = None
    """PEM file with its private key, not encrypted."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call: `https://chat.example.org`, `app://obsidian.md`, `null`,
    or `*`.
    """
    allowed_hosts: tuple[str, ...] | None = None
    """Without keys: the Host headers with which operators' calls are answered, with a port or for
    any port. Unset: localhost, 127.0.0.1 and [::1]; all where auth.without_keys is `everything`.
    """

    @model_validator(mode="after")
    def _tls_has_both(self) -> HttpSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; set both, or neither")
        return self

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not is_origin(origin):  # it would never match
                raise ValueError(
                    f"{origin!r} is no origin as browsers send it; write SCHEME://HOST[:PORT] "
                    "without a path, a default port or capitals, or null, or *"
                )
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for host in hosts or ():
            if parse_host(host) is None:
                raise ValueError(f"{host!r} is no host; write NAME[:PORT], an address, [IPV6]")
        return hosts
