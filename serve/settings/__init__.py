"""All settings: one frozen tree of sections, each in a file named after its owner. This file alone
reads the environment and YAML.

Sources, strongest first: command-line flags, environment (`PACKHORSE_HTTP__PORT=8001`), the YAML
file given with `--config`, the sections' defaults. Unknown names are errors in every source.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from packhorse.serve.errors import StartupError
from packhorse.serve.settings.adapters import AdapterSettings
from packhorse.serve.settings.admission import AdmissionSettings
from packhorse.serve.settings.auth import AuthSettings
from packhorse.serve.settings.batches import BatchSettings
from packhorse.serve.settings.cache import CacheSettings
from packhorse.serve.settings.engine import EngineSettings
from packhorse.serve.settings.http import HttpSettings
from packhorse.serve.settings.renamed import RENAMED, Renames
from packhorse.serve.settings.responses import ResponsesSettings
from packhorse.serve.settings.routing import RoutingSettings
from packhorse.serve.settings.rpc import RpcSettings
from packhorse.serve.settings.section import Section
from packhorse.serve.settings.service import ServiceSettings
from packhorse.serve.settings.supervisor import SupervisorSettings
from packhorse.serve.settings.tracing import TracingSettings

ENV_PREFIX = "PACKHORSE_"


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    model: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    """Format of the log lines; those of requests are JSON in both."""
    log_prompts: bool = False
    """Write the texts of requests into the log, for debugging."""
    http: HttpSettings = HttpSettings()
    rpc: RpcSettings = RpcSettings()
    service: ServiceSettings = ServiceSettings()
    auth: AuthSettings = AuthSettings()
    admission: AdmissionSettings = AdmissionSettings()
    supervisor: SupervisorSettings = SupervisorSettings()
    adapters: AdapterSettings = AdapterSettings()
    routing: RoutingSettings = RoutingSettings()
    cache: CacheSettings = CacheSettings()
    responses: ResponsesSettings = ResponsesSettings()
    batches: BatchSettings = BatchSettings()
    tracing: TracingSettings = TracingSettings()
    engine: EngineSettings = EngineSettings()


def load(config: Path | None, flags: dict[str, Any]) -> Settings:
    """Settings from all sources. `flags` is nested like the tree and holds only the flags that were
    typed. Earlier names of settings are taken, with a warning on the log.

    Raises StartupError with every offending name, its value and what is allowed.
    """
    if config is not None and not config.is_file():
        raise StartupError(f"--config {config}: no such file.")

    renames = Renames()

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
            yaml_settings = YamlConfigSettingsSource(settings_cls, yaml_file=config)
            return tuple(
                _Renaming(settings_cls, source, renames)
                for source in (init_settings, env_settings, yaml_settings)
            )

    _refuse_unknown_environment()
    try:
        settings = Sources(**flags)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}{_shown(e)}: {e['msg']}" for e in error.errors()]
        raise StartupError("These settings are not valid:\n" + "\n".join(lines)) from error
    except StartupError:
        raise
    except Exception as error:
        where = f"--config {config}" if config else "The settings"
        raise StartupError(f"{where} cannot be read: {error}") from error
    if settings.tracing.endpoint and os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        raise StartupError(
            "tracing.endpoint is set, and OTEL_SDK_DISABLED=true in the environment: no span would "
            "be made. Take out one of the two."
        )
    return settings


class _Renaming(PydanticBaseSettingsSource):
    """A source whose values come under the settings' new names."""

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        source: PydanticBaseSettingsSource,
        renames: Renames,
    ) -> None:
        super().__init__(settings_cls)
        self._source, self._renames = source, renames

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._source.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        return self._renames.applied(self._source())


def _shown(fault: ErrorDetails) -> str:
    """The offending value for a message; empty for a whole section, for a secret, and for a value
    under a mistyped name, which may be one.
    """
    secrets = {"auth", "cache", "tracing", "hf_token"}
    secretive = fault["type"] == "extra_forbidden" or secrets & {*fault["loc"]}
    if secretive or isinstance(fault["input"], dict):
        return ""
    return f" = {fault['input']!r}"


def shown(settings: Settings) -> dict[str, Any]:
    """The whole tree for operators, without secrets."""
    return _masked(settings.model_dump(mode="json"))


def _masked(section: dict[str, Any]) -> dict[str, Any]:
    """The section without secrets. The engine section may hold any of vLLM's arguments, tokens
    among them, so names decide.
    """
    return {
        name: _masked(value)
        if isinstance(value, dict)
        else "**********"
        if value is not None and re.search("token$|secret|password|api_key|admin_key", name)
        else value
        for name, value in section.items()
    }


def _refuse_unknown_environment() -> None:
    """Raises StartupError for an unknown PACKHORSE_ name, which pydantic-settings would ignore."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            known |= {f"{ENV_PREFIX}{name}__{inner}".upper() for inner in section.model_fields}
    earlier = {
        f"{ENV_PREFIX}{section}__{old}".upper()
        for section, names in RENAMED.items()
        for old in names
    }
    given = {name for name in os.environ if name.upper().startswith(ENV_PREFIX)}
    # PACKHORSE_BUILD is read by `make setup`.
    taken = known | earlier | {"PACKHORSE_BUILD"}
    unknown = sorted(name for name in given if name.upper() not in taken)
    if unknown:
        close = difflib.get_close_matches(unknown[0].upper(), known, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; see docs/settings.md."
        raise StartupError(f"There is no setting {unknown[0]}{hint}")


def cache_home() -> Path:
    """Folder for files that can be made again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "packhorse"


# Words of vLLM's variables that do not change answers.
_HARMLESS = {"HOST", "PORT", "LOGGING", "USAGE", "TRACE", "ASSETS", "DEBUG", "KEY", "ROOT"}


def answer_environment() -> dict[str, str]:
    """The variables that may change the engine's answers: all VLLM_ ones but those that are known
    to be harmless.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("VLLM_") and not _HARMLESS & set(name.split("_"))
    }


def prepare_environment() -> None:
    """Set the variables that vLLM reads at import: no usage reports, quiet logs, spawn instead of
    fork (this process has threads). Those that the user has set stay. Call it before the first
    import of vllm.
    """
    # Engines are killed at once and we free their shared memory; Python's tracker would complain.
    quiet = [os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, quiet))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # Engines are not forked from this process, so gRPC's threads need not stop for forks.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
