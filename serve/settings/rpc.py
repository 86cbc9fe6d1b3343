"""Settings of the gRPC listener (rpc/), see docs/grpc.md."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from packhorse.serve.settings.section import Section


class RpcSettings(Section):
    port: int | None = Field(None, ge=0, le=65535)
    """Unset: no gRPC. 0 lets the system choose; the start-up line says which."""
    host: str = "127.0.0.1"
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Larger requests are refused."""
    stalled_client_timeout_s: float = Field(60.0, gt=0)
    """A client that reads nothing of a stream, or sends no message, for this long is cut off."""
    keep_alive_s: float = Field(60.0, ge=1)
    """Interval of the pings on a connection without traffic."""
    admin: bool | None = None
    """Whether operators' calls are on this port. Unset: unless http.admin_port keeps them apart."""
    max_calls: int = Field(4096, ge=1)
    """Concurrent calls, health watches included; more are refused before they are read."""
    max_connections: int = Field(4096, ge=1)
    """Connections above this number are closed at once."""
    max_connection_age_s: float | None = Field(1800.0, gt=0)
    """A connection of about this age gets a GOAWAY: its client opens a new one, which may reach
    another replica. No call fails. null: never.
    """
    max_connection_age_grace_s: float = Field(3600.0, gt=0)
    """How long calls may go on after that GOAWAY; then they are cut off. Below
    service.max_request_timeout_s, long requests may be cut off.
    """
    max_connection_idle_s: float | None = Field(300.0, gt=0)
    """A connection without a call for this long gets a GOAWAY, too. null: never."""
    reflection: bool = True
    """Whether the gRPC reflection service is there, which lists the services."""
    tls_certificate: Path | None = None
    """PEM file with the certificate chain."""
    tls_key: Path | None = None
    """PEM file with its private key."""
    client_ca: Path | None = None
    """PEM file with the CA certificates that sign clients' certificates (mutual TLS)."""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> RpcSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; set both, or neither")
        if self.client_ca is not None and self.tls_certificate is None:
            raise ValueError("client_ca needs tls_certificate and tls_key")
        return self
