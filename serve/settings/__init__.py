"""All settings: one frozen tree of sections. The only file that reads the environment and YAML.

Sources, strongest first: command-line flags, environment (`PACKHORSE_HTTP__PORT=8001`), the YAML
file given with `--config`, the defaults below. Unknown names are errors, in every source.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

from packhorse.serve.errors import StartupError
from packhorse.serve.settings.sections import (
    AdapterSettings,
    AdmissionSettings,
    AuthSettings,
    CacheSettings,
    EngineSettings,
    HttpSettings,
    RoutingSettings,
    RpcSettings,
    Section,
    ServiceSettings,
    SupervisorSettings,
    TracingSettings,
)
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

ENV_PREFIX = "PACKHORSE_"


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    model: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    """Of all lines but those of requests, which are JSON always."""
    log_prompts: bool = False
    """Write requests' texts into the log, for debugging."""
    http: HttpSettings = HttpSettings()
    rpc: RpcSettings = RpcSettings()
    service: ServiceSettings = ServiceSettings()
    auth: AuthSettings = AuthSettings()
    admission: AdmissionSettings = AdmissionSettings()
    supervisor: SupervisorSettings = SupervisorSettings()
    adapters: AdapterSettings = AdapterSettings()
    routing: RoutingSettings = RoutingSettings()
    cache: CacheSettings = CacheSettings()
    tracing: TracingSettings = TracingSettings()
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
        settings = Sources(**flags)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}{_shown(e)}: {e['msg']}" for e in error.errors()]
        raise StartupError("These settings are not valid:\n" + "\n".join(lines)) from error
    except Exception as error:
        where = f"--config {config}" if config else "The settings"
        raise StartupError(f"{where} cannot be read: {error}") from error
    if settings.tracing.endpoint and os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        raise StartupError(
            "tracing.endpoint is set, and OTEL_SDK_DISABLED=true in the environment: no span would "
            "be made. Take out one of the two."
        )
    return settings


def _shown(fault: ErrorDetails) -> str:
    """The value at fault, unless it is a secret or may be one under a mistyped name, or a whole
    section.
    """
    secrets = {"auth", "cache", "tracing", "hf_token"}
    secretive = fault["type"] == "extra_forbidden" or secrets & {*fault["loc"]}
    if secretive or isinstance(fault["input"], dict):
        return ""
    return f" = {fault['input']!r}"


def shown(settings: Settings) -> dict[str, Any]:
    """What operators may see: all of it, without secrets."""
    return _masked(settings.model_dump(mode="json"))


def _masked(section: dict[str, Any]) -> dict[str, Any]:
    """vLLM's own engine arguments are taken as they come, tokens among them."""
    return {
        name: _masked(value)
        if isinstance(value, dict)
        else "**********"
        if value is not None and re.search("token$|secret|password|api_key|admin_key", name)
        else value
        for name, value in section.items()
    }


def _refuse_unknown_environment() -> None:
    """pydantic-settings passes over unknown names; a typing mistake should be told."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            known |= {f"{ENV_PREFIX}{name}__{inner}".upper() for inner in section.model_fields}
    given = {name for name in os.environ if name.upper().startswith(ENV_PREFIX)}
    # PACKHORSE_BUILD is make setup's.
    unknown = sorted(name for name in given if name.upper() not in known | {"PACKHORSE_BUILD"})
    if unknown:
        close = difflib.get_close_matches(unknown[0].upper(), known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; see docs/settings.md."
        raise StartupError(f"There is no setting {unknown[0]}{hint}")


def cache_home() -> Path:
    """Where what can be made again is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "packhorse"


# vLLM's own that decide nothing of an answer.
_HARMLESS = {"HOST", "PORT", "LOGGING", "USAGE", "TRACE", "ASSETS", "DEBUG", "KEY", "ROOT"}


def answer_environment() -> dict[str, str]:
    """What of the environment may change the engine's answers: all that vLLM reads under its own
    name, but for what is known to be harmless.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("VLLM_") and not _HARMLESS & set(name.split("_"))
    }


def prepare_environment() -> None:
    """Set what vLLM reads from the environment at import; what the user has set stays.

    Must run before the first import of vllm: no usage reports, quiet logs, spawn instead of fork
    (threads run here).
    """
    # Engines are ended at once and we free what they shared; Python's tracker would complain.
    quiet = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # Engines are no forks of this process, and gRPC's threads need not stop for what is one.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
