"""The sections of the settings, one class per owner: defaults and limits. `settings` reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from packhorse.serve.settings.hosts import is_origin, parse_host
from packhorse.serve.settings.outbound import CacheSettings as CacheSettings
from packhorse.serve.settings.outbound import Section as Section
from packhorse.serve.settings.outbound import TracingSettings as TracingSettings
from packhorse.serve.settings.outbound import stripped as stripped
from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator

WithoutKeys = Literal["loopback", "inference", "everything"]


class HttpSettings(Section):
    """Owner: rest/ and main."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 lets the system choose; the start-up line says which."""
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Larger request bodies are refused with 413 before they are read whole."""
    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """What becomes of fields of requests that this server does not know: ignored, and told in
    x-packhorse-ignored, or refused with 400. Those that would change the answer are always refused.
    """
    stalled_client_timeout_s: float = Field(60.0, gt=0)
    """A client that for so long takes nothing of a stream, or does not finish its request, is cut
    off.
    """
    heartbeat_s: float | None = Field(15.0, gt=0)
    """A stream that has said nothing for so long gets a comment, before its first token too:
    proxies cut off what is silent for a minute. null: never.
    """
    keep_alive_s: int = Field(75, ge=1)
    """An idle connection is closed after so long. Longer than the 60 s of most load balancers: they
    must close first, or they send a request into a connection that is closing.
    """
    max_connections: int = Field(4096, ge=1)
    """On all ports. One more takes the place of that from which nothing has been heard for longest;
    where all have a request that is being answered, it gets 503.
    """
    header_timeout_s: float = Field(20.0, gt=0)
    """How long the headers of a request may take to come, from a connection's opening or from the
    first byte after an answer. TLS's handshake may take as long again.
    """
    max_header_bytes: int = Field(64 * 1024, ge=1024)
    """Larger headers of a request get 431, and the connection is closed."""
    admin_port: int | None = Field(None, ge=0, le=65535)
    """A second port, for /metrics and /admin; they are then nowhere else."""
    admin_host: str = "127.0.0.1"
    """Where admin_port is listened on."""
    tls_certificate: Path | None = None
    """PEM file with the certificate chain; https, on both ports, instead of http."""
    tls_key: Path | None = None
    """PEM file with its private key, not encrypted."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call: `https://chat.example.org`, `app://obsidian.md`, `null`, or `*`."""
    allowed_hosts: tuple[str, ...] | None = None
    """Without keys, Hosts under which operators' calls are answered: `ops.example`, with a port or
    for any. Unset: localhost, 127.0.0.1 and [::1]; with auth.without_keys `everything`, all.
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


class RpcSettings(Section):
    """Owner: rpc/. gRPC beside HTTP, see docs/grpc.md."""

    port: int | None = Field(None, ge=0, le=65535)
    """Unset: no gRPC. 0 lets the system choose; the start says which."""
    host: str = "127.0.0.1"
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Larger requests are refused."""
    stalled_client_timeout_s: float = Field(60.0, gt=0)
    """A client that for so long takes nothing of a stream, or sends no message, is cut off."""
    keep_alive_s: float = Field(60.0, ge=1)
    """How often a connection without traffic is tried."""
    admin: bool | None = None
    """Whether operators' calls are on this port. Unset: unless http.admin_port keeps them apart."""
    max_calls: int = Field(4096, ge=1)
    """Calls at once, health watches among them; more are refused before they are read."""
    max_connections: int = Field(4096, ge=1)
    """More are closed as they come."""
    max_connection_age_s: float | None = Field(1800.0, gt=0)
    """A connection of about this age is told to make place for a new one (GOAWAY), which may reach
    another replica; no call fails by that. null: never.
    """
    max_connection_age_grace_s: float = Field(3600.0, gt=0)
    """How long calls on such a connection may still run, then they are cut off. Not below
    service.max_request_timeout_s, unless they may be.
    """
    max_connection_idle_s: float | None = Field(300.0, gt=0)
    """A connection without a call for so long gets a GOAWAY, too. null: never."""
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


class AuthSettings(Section):
    """Owner: auth."""

    keys_file: Path | None = None
    """YAML or JSON list of keys, see docs/access.md; read again when it changes."""
    api_key: SecretStr | None = None
    """One key for inference and metrics, for a server without a keys file."""
    admin_key: SecretStr | None = None
    """One that may do everything, beside it or alone."""
    without_keys: WithoutKeys = "inference"
    """What callers may do where there is no key at all. `inference`: infer and read /metrics;
    operators' calls from this machine or on http.admin_port alone. `loopback`: the same, and the
    server starts only where no other machine reaches it. `everything`: all of it, from anywhere.
    """
    open_metrics: bool = False
    """GET /metrics needs no key: routers of several servers send none."""

    @property
    def has_keys(self) -> bool:
        return any(key is not None for key in (self.keys_file, self.api_key, self.admin_key))


class AdmissionSettings(Section):
    """Owner: admission. What is refused at once with 429."""

    max_in_flight: int = Field(1024, ge=1)
    """HTTP or gRPC calls at once, checked before their bodies are read."""
    max_bodies_bytes: int = Field(256 * 2**20, ge=2**20)
    """Bytes of bodies and messages that all calls in progress hold; half of it for one key."""
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
    poison_ttl_s: float = Field(3600.0, gt=0)
    """How long a request that two engines have died of, or one that equals it, is refused."""


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
    revision: str | None = None
    """Branch, tag or commit, where the model is a hub's. It is looked up once: the server keeps to
    one commit.
    """
    tokenizer_revision: str | None = None
    """The same for the tokenizer, where it is another's (`tokenizer`) or of another revision."""
    hf_token: SecretStr | None = None
    """For the hub. Unset: HF_TOKEN of the environment, or the login that is stored."""
    download_dir: Path | None = None
    """Where downloads are kept. Unset: the hub's own cache folder."""
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

    @field_validator("hf_token")
    @classmethod
    def _can_be_sent(cls, token: SecretStr | None) -> SecretStr | None:
        """HTTP's client quotes the value when one cannot."""
        token = stripped(token) if token is not None else None
        if token is not None and not re.fullmatch(r"[!-~]+", token.get_secret_value()):
            raise ValueError("must be printable ASCII without blanks, and not empty")
        return token

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
    allowed_roots: tuple[Path, ...] | None = None
    """Folders that adapters may be added from, with all below them. `folder` is always one. Unset:
    the Hub's cache is the only other.
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

    @field_validator("allowed_roots")
    @classmethod
    def _are_whole_paths(cls, roots: tuple[Path, ...] | None) -> tuple[Path, ...] | None:
        expanded = None if roots is None else tuple(root.expanduser() for root in roots)
        for root in expanded or ():
            if not root.is_absolute():
                raise ValueError(f"{str(root)!r} is not absolute; give the folder's whole path")
        return expanded

    @property
    def store_folder(self) -> Path | None:
        """None: no adapters."""
        return self.store or (self.folder / ".store" if self.folder else None)
