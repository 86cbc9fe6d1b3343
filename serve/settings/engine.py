"""Settings of the engine (engines/)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator

from packhorse.serve.settings.hosts import parse_host
from packhorse.serve.settings.section import Section, stripped


class ImageSettings(Section):
    """Of images in requests (engines/images.py), see docs/api.md."""

    allowed_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from (`images.example.com`), over http and https. None: only
    data URLs are taken. Addresses that are not public are refused for every host.
    """
    max_images: int = Field(8, ge=0)
    """Most images in one request."""
    max_bytes: int = Field(8 * 2**20, ge=1)
    """Size limit of one encoded image. http.max_body_bytes limits data URLs, too."""
    max_pixels: int = Field(2**24, ge=1)
    """Most pixels of one image, width times height. It is checked before the image is decoded."""
    fetch_timeout_s: float = Field(10.0, gt=0, le=600)
    """Time limit for fetching one image."""

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        names = []
        for host in hosts:
            parsed = parse_host(host)
            if parsed is None or parsed[1] is not None:
                raise ValueError(f"{host[:80]!r} is not a host name; send images.example.com")
            names.append(parsed[0])
        return tuple(names)


class EngineSettings(Section):
    """None means: what suits the machine (see engines/vllm/arguments.py), or vLLM's default.

    Any other field of vLLM's AsyncEngineArgs is taken too, under vLLM's name; the engine checks it.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: Literal["vllm", "echo", "vllm-echo"] = "vllm"
    """`echo` answers with the last message and needs no model: for tests of everything around the
    engine. `vllm-echo` does so with vLLM's rendering and parsers, on a model's folder: a prompt
    that holds a tool call in the model's own words is answered with the call.
    """
    revision: str | None = None
    """Branch, tag or commit of a model from a hub. It is resolved once: the server keeps to one
    commit.
    """
    tokenizer_revision: str | None = None
    """Revision of the tokenizer, where it is another repository's (`tokenizer`) or differs."""
    hf_token: SecretStr | None = None
    """Token for the hub. Unset: HF_TOKEN of the environment, or the stored login."""
    download_dir: Path | None = None
    """Folder for downloads. Unset: the hub's own cache folder."""
    runner: Literal["auto", "generate", "pooling"] = "auto"
    """What the model is for: to generate text, or for embeddings, rerank and classification. vLLM
    finds out by itself for nearly all models.
    """
    images: ImageSettings = ImageSettings()
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
    """Serve LoRA adapters too; the adapters section switches it on."""
    max_loras: int = Field(4, ge=1)
    """Adapters in one batch; requests for others wait."""
    lora_oversubscription: int | None = Field(None, ge=1)
    """Active adapters per LoRA slot of a batch, while adapters have at most max_num_seqs requests.
    Above 1, the adapters of a slot are time-sliced, a few engine steps each.
    Default: 2 on a CPU, but at most half of max_cpu_loras; 1 on a GPU, where it is not tested yet.
    """
    max_cpu_loras: int = Field(32, ge=1)
    """Adapters that the engine keeps loaded; others are loaded when a request needs them."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 16
    """Adapters of a higher rank are refused. Every adapter costs the memory and time of this rank.
    """
    seed: int = 0
    tool_call_parser: str | None = None
    """How the model writes tool calls (hermes, llama3_json, mistral, ...); allows tool_choice."""
    reasoning_parser: str | None = None
    """How the model marks its reasoning (qwen3, deepseek_r1, ...), which is then a field apart."""
    max_json_whitespace: int | None = Field(16, ge=0)
    """In JSON answers (response_format, structured_outputs, forced tools): the most characters of
    white space in a row between two tokens of JSON. Without a limit (null: as in vLLM) a model may
    write white space until max_tokens. 16 is enough to indent 7 levels by 2.
    """
    chat_template: str | None = None
    """Path of a Jinja file, or the template itself; the model's own when unset."""
    default_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template; a request's own win."""
    stall_timeout_s: float = Field(10.0, gt=0)
    """The engine counts as hung when requests wait and, for this long, no step has ended and the
    workers have used no CPU.
    """
    step_timeout_s: float = Field(300.0, gt=0)
    """The engine counts as hung when requests wait and no step has ended for this long, whatever
    the workers do.
    """
    echo_delay_s: float = Field(0.0, ge=0)
    """Echo engine only: pause before each chunk."""

    @field_validator("hf_token")
    @classmethod
    def _can_be_sent(cls, token: SecretStr | None) -> SecretStr | None:
        """httpx quotes a header value that it cannot send, so a bad token would be logged."""
        token = stripped(token) if token is not None else None
        if token is not None and not re.fullmatch(r"[!-~]+", token.get_secret_value()):
            raise ValueError("must be printable ASCII without blanks, and not empty")
        return token

    @model_validator(mode="after")
    def _holds_what_a_batch_needs(self) -> EngineSettings:
        if self.max_cpu_loras <= self.max_loras:  # a new version is loaded beside those in use
            raise ValueError(
                f"max_cpu_loras={self.max_cpu_loras} is not above max_loras={self.max_loras}; "
                "raise it"
            )
        per_slot = self.lora_oversubscription
        if per_slot and self.max_loras * per_slot >= self.max_cpu_loras:
            raise ValueError(
                f"max_cpu_loras={self.max_cpu_loras} is not above max_loras={self.max_loras} times "
                f"lora_oversubscription={per_slot}; raise it"
            )
        return self
