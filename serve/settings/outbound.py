"""The sections of the settings about programs that the server itself calls: the store of results
and the collector of traces; and what all sections have in common. `sections` has the others.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def stripped(secret: SecretStr) -> SecretStr:
    """Without what `echo` and editors leave around it: an end of line, blanks."""
    return SecretStr(secret.get_secret_value().strip())


class TracingSettings(Section):
    """Owner: tracing. OpenTelemetry, see docs/observability.md."""

    endpoint: str | None = Field(None, pattern=r"^https?://")
    """Where spans go, by OTLP: http://HOST:4317 for grpc, http://HOST:4318 for http/protobuf.
    Unset: no tracing.
    """
    protocol: Literal["grpc", "http/protobuf"] = "grpc"
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Sent with them; keys of hosted collectors go here."""

    @field_validator("endpoint")
    @classmethod
    def _has_no_secret(cls, endpoint: str | None) -> str | None:
        """It is logged."""
        parts = urlsplit(endpoint or "")
        if parts.username is not None or parts.query:
            raise ValueError("a user or a query in it would be logged; use tracing.headers")
        return endpoint

    @field_validator("headers")
    @classmethod
    def _can_be_sent(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        """gRPC drops spans, and HTTP's client logs the value, when one cannot."""
        sent = {name: stripped(value) for name, value in headers.items()}
        for name, value in sent.items():
            if not re.fullmatch(r"[a-z0-9._-]+", name):
                raise ValueError(f"the name {name!r} is not of a-z, 0-9, '.', '_' and '-'")
            if not re.fullmatch(r"[ -~]+", value.get_secret_value()):
                raise ValueError(f"the value of {name} is not of printable ASCII alone")
        return sent

    sample_ratio: float = Field(1.0, ge=0, le=1)
    """How many of the calls are traced whose caller does not say (with `traceparent`)."""
    service_name: str = "packhorse"
    """What the spans are filed under."""


class CacheSettings(Section):
    """Owner: cache/. The result cache, see docs/caching.md."""

    enabled: bool = True
    memory_bytes: int = Field(256 * 2**20, ge=0)
    """Results in this process; the least recently used go first. 0: only the store has any."""
    ttl_s: float = Field(24 * 3600.0, gt=0)
    """Older results are not given out."""
    max_entry_bytes: int = Field(2**20, ge=1)
    """Larger results are not kept."""
    store: SecretStr | None = None
    """Shared by replicas: redis://HOST:PORT/DB, rediss:// (TLS), unix://PATH, or
    memcached://HOST:PORT. Needs `secret`.
    """
    secret: SecretStr | None = None
    """What tenants' marks and checksums are made with; the same for all replicas. Unset: a new one
    at each start.
    """
    prefix: str = Field("packhorse", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """What names in the store begin with."""
    timeout_s: float = Field(0.1, gt=0, le=10)
    """How long the store may take; the engine answers then."""
    digests_file: Path | None = None
    """Where digests of weight files are remembered, so that each is read once. Unset:
    packhorse/digests.json in the user's cache folder.
    """

    @field_validator("store")
    @classmethod
    def _is_a_store(cls, store: SecretStr | None) -> SecretStr | None:
        # Without the value in the message: it may have a password.
        schemes = ("redis://", "rediss://", "unix://", "memcached://")
        if store is not None and not store.get_secret_value().startswith(schemes):
            raise ValueError(f"must begin with one of {', '.join(schemes)}")
        return store

    @field_validator("secret")
    @classmethod
    def _is_long(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is None:
            return None
        secret = stripped(secret)  # or one replica with an end of line would share nothing
        if len(secret.get_secret_value()) < 16:
            raise ValueError("must have at least 16 characters; `openssl rand -hex 32` makes one")
        return secret

    @model_validator(mode="after")
    def _store_has_secret(self) -> CacheSettings:
        if self.store is not None and self.secret is None:
            raise ValueError(
                "cache.store needs cache.secret, the same for all replicas, or nothing could be "
                "shared; `openssl rand -hex 32` makes one"
            )
        return self
