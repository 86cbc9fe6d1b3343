"""The sections of the settings, one class per owner: defaults and limits. `settings` reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HttpSettings(Section):
    """Owner: rest/ and main."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 lets the system choose; the start-up line says which."""
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Larger request bodies are refused with 413 before they are read whole."""
    stalled_client_timeout_s: float = Field(60.0, gt=0)
    """A client that for so long takes nothing of a stream, or does not finish its request, is cut
    off.
    """
    keep_alive_s: int = Field(75, ge=1)
    """An idle connection is closed after so long. Longer than the 60 s of most load balancers: they
    must close first, or they send a request into a connection that is closing.
    """
    admin_port: int | None = Field(None, ge=0, le=65535)
    """A second port, for /metrics and /admin; they are then nowhere else."""
    admin_host: str = "127.0.0.1"
    """Where admin_port is listened on."""
    tls_certificate: Path | None = None
    """PEM file with the certificate chain; https, on both ports, instead of http."""
    tls_key: Path | None = None
    """PEM file with its private key, not encrypted."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call: `https://chat.example.org`, or `*`."""

    @model_validator(mode="after")
    def _tls_has_both(self) -> HttpSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; set both, or neither")
        return self

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            # Browsers send exactly this form; anything else would never match.
            if origin != "*" and not re.fullmatch(r"https?://[^/?#\s]+", origin):
                raise ValueError(f"{origin!r} is no origin; write https://HOST[:PORT], or *")
        return origins


class RpcSettings(Section):
    """Owner: rpc/. gRPC beside HTTP, see docs/grpc.md."""

    port: int | None = Field(None, ge=0, le=65535)
    """Unset: no gRPC. 0 lets the system choose; the start says which."""
    host: str = "127.0.0.1"
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Larger requests are refused."""
    stalled_client_timeout_s: float = Field(60.0, gt=0)
    """A client that for so long takes nothing of a stream is cut off."""
    keep_alive_s: float = Field(60.0, ge=1)
    """How often a connection without traffic is tried."""
    admin: bool | None = None
    """Whether operators' calls are on this port. Unset: unless http.admin_port keeps them apart."""
    max_calls: int = Field(4096, ge=1)
    """Calls at once, health watches among them; more are refused before they are read."""
    reflection: bool = True
    """Whether clients may ask which services there are."""
    tls_certificate: Path | None = None
    """PEM file with the certificate chain."""
    tls_key: Path | None = None
    """PEM file with its private key."""
    client_ca: Path | None = None
    """PEM file with the authorities whose clients may connect (mutual TLS)."""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> RpcSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together; set both, or neither")
        if self.client_ca is not None and self.tls_certificate is None:
            raise ValueError("client_ca needs tls_certificate and tls_key")
        return self


class ServiceSettings(Section):
    """Owner: service."""

    served_model_name: str | None = None
    """The name clients use; the model folder's own name when unset."""
    drain_timeout_s: float = Field(30.0, ge=0)
    """After SIGTERM, how long requests in flight may take to end by themselves."""
    request_timeout_s: float = Field(600.0, gt=0)
    """How long a request may take, waiting included, that does not say so itself."""
    max_request_timeout_s: float = Field(3600.0, gt=0)
    """The most that a request may ask for."""

    @model_validator(mode="after")
    def _default_is_allowed(self) -> ServiceSettings:
        if self.request_timeout_s > self.max_request_timeout_s:
            raise ValueError(
                f"request_timeout_s={self.request_timeout_s:g} is above max_request_timeout_s="
                f"{self.max_request_timeout_s:g}; raise the latter too"
            )
        return self


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
        for name, value in headers.items():
            if not re.fullmatch(r"[a-z0-9._-]+", name):
                raise ValueError(f"the name {name!r} is not of a-z, 0-9, '.', '_' and '-'")
            if not re.fullmatch(r"[ -~]+", value.get_secret_value()):
                raise ValueError(f"the value of {name} is not of printable ASCII alone")
        return headers

    sample_ratio: float = Field(1.0, ge=0, le=1)
    """How many of the calls are traced whose caller does not say (with `traceparent`)."""
    service_name: str = "packhorse"
    """What the spans are filed under."""


class AuthSettings(Section):
    """Owner: auth. Without either, everybody may do everything."""

    keys_file: Path | None = None
    """YAML or JSON list of keys, see docs/access.md; read again when it changes."""
    api_key: SecretStr | None = None
    """One key that may do everything, for a server without a keys file."""
    open_metrics: bool = False
    """GET /metrics needs no key: routers of several servers send none."""


class AdmissionSettings(Section):
    """Owner: admission. What is refused at once with 429."""

    max_in_flight: int = Field(1024, ge=1)
    """HTTP or gRPC calls at once, checked before their bodies are read."""
    max_running: int | None = Field(None, ge=1)
    """Answers (prompts x n) that the engine has, waiting or running. Unset: half as many again as
    it runs at once.
    """
    max_queued_tokens: int | None = Field(None, ge=1)
    """Prompt tokens of requests that have no answer yet. Unset: half as many again as the KV cache
    holds. One request is always taken, however long.
    """


class SupervisorSettings(Section):
    """Owner: engines/supervisor: how often a new engine is built when one dies or hangs."""

    max_restarts: int = Field(5, ge=0)
    """More deaths than this within restart_window_s, and the server exits with 1."""
    restart_window_s: float = Field(600.0, gt=0)
    backoff_s: float = Field(1.0, ge=0)
    """Pause before the second rebuild of a window; doubles with each after it, up to a minute."""
    build_timeout_s: float = Field(1800.0, gt=0)
    """An engine that is not there after so long has failed: its processes are ended."""


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
        if secret is not None and len(secret.get_secret_value()) < 16:
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


class RoutingSettings(Section):
    """Owner: routing/. Which adapter answers requests for the model `auto`."""

    enabled: bool = True
    """Whether there is such a model, on a server with adapters."""
    file: Path | None = None
    """Rules, default and thresholds, see docs/routing.md; read again when it changes."""
    base_name: bool = False
    """Route requests that name the base model, too."""


class EngineSettings(Section):
    """Owner: engines/. None means: what suits the machine (see arguments.py), or vLLM's default.

    Takes any other of vLLM's AsyncEngineArgs too, under its own name; the engine checks them.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: Literal["vllm", "echo"] = "vllm"
    """`echo` answers with the last message and needs no model: for tests of everything around the
    engine.
    """
    dtype: str = "auto"
    max_model_len: int | None = Field(None, ge=16)
    max_num_seqs: int | None = Field(None, ge=1)
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    kv_cache_memory_bytes: int | None = Field(None, ge=1024 * 1024)
    """Size of the KV-cache pool. On CPU the default is 1 GiB: vLLM's own takes a large share of the
    memory.
    """
    enforce_eager: bool | None = None
    """Skip torch.compile. Default on CPU: yes (start in 30 s instead of 100 s)."""
    enable_lora: bool = False
    """Serve adapters too; the adapters section switches it on."""
    max_loras: int = Field(4, ge=1)
    """Adapters in one batch; requests for others wait."""
    loras_per_slot: int | None = Field(None, ge=1)
    """Adapters at work for each place in a batch, while no more requests for adapters are there
    than max_num_seqs: beyond one they take turns of a few steps.
    Default: 2 on a CPU, but no more than half of max_cpu_loras; 1 on a GPU, where it has not been
    run yet.
    """
    max_cpu_loras: int = Field(32, ge=1)
    """Adapters that the engine holds in memory; others are loaded when a request comes."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Adapters of a higher rank are refused. Memory and time are those of this rank."""
    seed: int = 0
    tool_call_parser: str | None = None
    """How the model writes tool calls (hermes, llama3_json, mistral, ...); allows tool_choice."""
    reasoning_parser: str | None = None
    """How the model marks its reasoning (qwen3, deepseek_r1, ...), which is then told apart."""
    max_json_whitespace: int | None = Field(16, ge=0)
    """Where JSON is asked for (response_format, structured_outputs, forced tools): most characters
    of white space in a row between its parts. Without a limit (null: vLLM's way) a model may fill
    its answer with them until max_tokens. 16 is enough to indent 7 levels by 2.
    """
    chat_template: str | None = None
    """Path of a Jinja file, or the template itself; the model's own when unset."""
    default_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template; a request's own win."""
    stall_timeout_s: float = Field(10.0, gt=0)
    """Hung: requests wait, and for so long no step has ended and the workers have used no CPU."""
    step_timeout_s: float = Field(300.0, gt=0)
    """Hung: requests wait, and no step has ended for so long, whatever the workers do."""
    echo_delay_s: float = Field(0.0, ge=0)
    """Echo engine only: pause before each chunk."""

    @model_validator(mode="after")
    def _holds_what_a_batch_needs(self) -> EngineSettings:
        if self.max_cpu_loras <= self.max_loras:  # a new version needs a place beside those in use
            raise ValueError(
                f"max_cpu_loras={self.max_cpu_loras} is not above max_loras={self.max_loras}; "
                "raise it"
            )
        if self.loras_per_slot and self.max_loras * self.loras_per_slot >= self.max_cpu_loras:
            raise ValueError(
                f"max_cpu_loras={self.max_cpu_loras} is not above max_loras={self.max_loras} times "
                f"loras_per_slot={self.loras_per_slot}; raise it"
            )
        return self


class AdapterSettings(Section):
    """Owner: adapters/. Without `folder` and `store`, no adapters are served."""

    folder: Path | None = None
    """Watched: every folder in it that PEFT has saved is an adapter, under the folder's name."""
    store: Path | None = None
    """Where copies are kept, and what was registered, over restarts. Unset: `.store` in `folder`.
    """
    max_registered: int = Field(1000, ge=1)
    max_running: int | None = Field(None, ge=1)
    """Requests of one adapter in the engine; more wait. Unset: no limit."""
    max_waiting: int | None = Field(None, ge=1)
    """Requests of one adapter that wait for their turn; more get 429. Unset: as many as the engine
    runs at once.
    """
    turn_tokens: int = Field(4096, ge=1)
    """What one adapter may use at a time while others wait to get into the engine."""
    max_bytes: int = Field(4 * 2**30, ge=2**20)
    """Larger adapters are refused."""

    @property
    def store_folder(self) -> Path | None:
        """None: no adapters."""
        return self.store or (self.folder / ".store" if self.folder else None)
