"""All settings: one frozen tree, one class per owner. The only file that reads the environment and
YAML.

Sources, strongest first: command-line flags, environment (`PACKHORSE_HTTP__PORT=8001`), the YAML
file given with `--config`, the defaults below. Unknown names are errors, in every source.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from serve.errors import StartupError

ENV_PREFIX = "PACKHORSE_"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HttpSettings(_Section):
    """Owner: rest/ and main."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 lets the system choose; the start-up line says which."""
    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Larger request bodies are refused with 413 before they are read whole."""


class ServiceSettings(_Section):
    """Owner: service."""

    served_model_name: str | None = None
    """The name clients use; the model folder's own name when unset."""
    drain_timeout_s: float = Field(30.0, ge=0)
    """After SIGTERM, how long requests in flight may take to end by themselves."""


class EngineSettings(_Section):
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
    seed: int = 0
    tool_call_parser: str | None = None
    """How the model writes tool calls (hermes, llama3_json, mistral, ...); allows tool_choice."""
    reasoning_parser: str | None = None
    """How the model marks its reasoning (qwen3, deepseek_r1, ...), which is then told apart."""
    chat_template: str | None = None
    """Path of a Jinja file, or the template itself; the model's own when unset."""
    default_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template; a request's own win."""
    echo_delay_s: float = Field(0.0, ge=0)
    """Echo engine only: pause before each chunk."""


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    model: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    http: HttpSettings = HttpSettings()
    service: ServiceSettings = ServiceSettings()
    engine: EngineSettings = EngineSettings()


def load(config: Path | None, flags: dict[str, Any]) -> Settings:
    """Settings from all sources. `flags` is nested like the tree and holds only what was typed.

    Raises StartupError with every offending name, its value and what is allowed.
    """
    if config is not None and not config.is_file():
        raise StartupError(f"--config {config}: no such file.")

    class Sources(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                init_settings,
                env_settings,
                YamlConfigSettingsSource(settings_cls, yaml_file=config),
            )

    _refuse_unknown_environment()
    try:
        return Sources(**flags)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()
        ]
        raise StartupError("These settings are not valid:\n" + "\n".join(lines)) from error
    except Exception as error:
        where = f"--config {config}" if config else "The settings"
        raise StartupError(f"{where} cannot be read: {error}") from error


def _refuse_unknown_environment() -> None:
    """pydantic-settings passes over unknown names; a typing mistake should be told."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            known |= {f"{ENV_PREFIX}{name}__{inner}".upper() for inner in section.model_fields}
    given = {name for name in os.environ if name.upper().startswith(ENV_PREFIX)}
    # PACKHORSE_BUILD is make setup's.
    unknown = sorted(name for name in given if name.upper() not in known | {"PACKHORSE_BUILD"})
    if unknown:
        close = difflib.get_close_matches(unknown[0].upper(), known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; see docs/settings.md."
        raise StartupError(f"There is no setting {unknown[0]}{hint}")


def prepare_environment() -> None:
    """Set what vLLM reads from the environment at import; what the user has set stays.

    Must run before the first import of vllm: no usage reports, quiet logs, spawn instead of fork
    (threads run here).
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
