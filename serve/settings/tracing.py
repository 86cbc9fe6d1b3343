"""Settings of tracing (telemetry/tracing.py), see docs/observability.md."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from packhorse.serve.settings.section import Section, stripped


class TracingSettings(Section):
    endpoint: str | None = Field(None, pattern=r"^https?://")
    """OTLP collector of the spans: http://HOST:4317 for grpc, http://HOST:4318 for http/protobuf.
    Unset: no tracing.
    """
    protocol: Literal["grpc", "http/protobuf"] = "grpc"
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Headers of the export requests; for the API keys of hosted collectors."""

    @field_validator("endpoint")
    @classmethod
    def _has_no_secret(cls, endpoint: str | None) -> str | None:
        """The endpoint is logged."""
        parts = urlsplit(endpoint or "")
        if parts.username is not None or parts.query:
            raise ValueError("a user or a query in it would be logged; use tracing.headers")
        return endpoint

    @field_validator("headers")
    @classmethod
    def _can_be_sent(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        """If a header cannot be sent, gRPC drops spans and the HTTP client logs the value."""
        sent = {name: stripped(value) for name, value in headers.items()}
        for name, value in sent.items():
            if not re.fullmatch(r"[a-z0-9._-]+", name):
                raise ValueError(f"the name {name!r} is not of a-z, 0-9, '.', '_' and '-'")
            if not re.fullmatch(r"[ -~]+", value.get_secret_value()):
                raise ValueError(f"the value of {name} is not of printable ASCII alone")
        return sent

    sample_ratio: float = Field(1.0, ge=0, le=1)
    """Share of traced calls among those without a `traceparent` header."""
    service_name: str = "packhorse"
    """The spans' resource attribute service.name."""
