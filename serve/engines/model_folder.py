"""Finds the folders of a model, once in a server's life: a rebuilt engine must not serve another
commit of a hub's branch.

Apart from the engine, so that a wrong path is an error at once: importing vllm takes seconds.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import get_token, snapshot_download

from packhorse.serve.errors import StartupError
from packhorse.serve.settings.engine import EngineSettings

logger = logging.getLogger("packhorse.engine")

# The same weights in formats that are not served.
OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]
ANY_WEIGHTS = [*OTHER_WEIGHTS, "*.safetensors"]
_TOKENS = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=Bearer )[^'\"]+")


@dataclass(frozen=True)
class Found:
    """Where the model is: `folder`, `commit` if it came from a hub, `arguments` of vLLM that name
    other local folders now (a tokenizer, a draft model), and those folders (`others`).
    """

    folder: Path
    commit: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    others: tuple[Path, ...] = ()


class Model:
    """A model by its path or hub name, with the engine settings that select its files."""

    def __init__(self, name: str, settings: EngineSettings) -> None:
        self._name, self._settings = name, settings
        self._lock = threading.Lock()
        self._commits: dict[tuple[str, str | None], str] = {}
        self._found: Found | None = None

    def found(self) -> Found:
        """The same folders at every call. The first call may download; so may a later one, of the
        same commit, if the hub's cache has been emptied. Call it in a worker thread.

        Raises StartupError when there is nothing to serve, and for settings that have no effect.
        """
        with self._lock:
            found = self._found
            if found is None or not all(map(Path.is_dir, (found.folder, *found.others))):
                self._found = found = self._find()
            return found

    def _find(self) -> Found:
        settings, others = self._settings, self._others()
        self._refuse_without_effect([self._name, *(name for name, _ in others.values())])
        folder = self._folder(self._name, settings.revision, OTHER_WEIGHTS)
        _check(self._name, folder)
        arguments: dict[str, Any] = {}
        folders = []
        for argument, (name, revision) in others.items():
            is_draft = argument == "speculative_config"
            found = self._folder(name, revision, OTHER_WEIGHTS if is_draft else ANY_WEIGHTS)
            folders.append(found)
            if is_draft:
                draft = {**_extra(settings)[argument], "model": str(found)}
                draft.pop("revision", None)
                arguments[argument] = draft
            else:
                arguments[argument] = str(found)
        for local, _ in self._named().values():  # on this machine: these files decide answers too
            if isinstance(local, str) and not is_hub_name(local):
                place = Path(local).expanduser()
                if place.is_dir() and place != folder:
                    folders.append(place)
        commit = self._commits.get((self._name, settings.revision))
        return Found(folder, commit, arguments, tuple(folders))

    def _others(self) -> dict[str, tuple[str, str | None]]:
        """vLLM's arguments that name another repository of the hub, with its revision."""
        return {
            argument: (name, revision)
            for argument, (name, revision) in self._named().items()
            if isinstance(name, str) and is_hub_name(name)
        }

    def _named(self) -> dict[str, tuple[object, str | None]]:
        """vLLM's arguments that name files beside the model's, with their revision."""
        settings, extra = self._settings, _extra(self._settings)
        named: dict[str, tuple[object, str | None]] = {
            # vLLM takes the tokenizer from the model, but may take that of another revision.
            "tokenizer": (
                extra.get("tokenizer") or (settings.tokenizer_revision and self._name),
                settings.tokenizer_revision,
            ),
            "hf_config_path": (extra.get("hf_config_path"), None),
            "generation_config": (extra.get("generation_config"), None),
        }
        draft = extra.get("speculative_config")
        if isinstance(draft, dict):
            named["speculative_config"] = (draft.get("model"), draft.get("revision"))
        return named

    def _refuse_without_effect(self, names: Sequence[str]) -> None:
        """Raises StartupError for settings that nothing reads."""
        settings, name = self._settings, self._name
        tokenizer = _extra(settings).get("tokenizer") or name
        of_folders = {
            "revision": (settings.revision, name),
            "tokenizer_revision": (settings.tokenizer_revision, str(tokenizer)),
        }
        for setting, (value, place) in of_folders.items():
            if value is not None and not is_hub_name(place):
                raise StartupError(
                    f"engine.{setting}={value} has no effect on {place}, which is not a hub's name "
                    "(organisation/name) but a place on this machine; remove it."
                )
        if settings.download_dir is not None and not any(map(is_hub_name, names)):
            raise StartupError(
                f"engine.download_dir={settings.download_dir} has no effect: nothing is downloaded "
                f"for {name}, which is a place on this machine; remove it."
            )

    def _folder(self, name: str, revision: str | None, ignored: list[str]) -> Path:
        if not is_hub_name(name):
            return Path(name).expanduser()
        settings = self._settings
        known = self._commits.get((name, revision))
        secret = settings.hf_token.get_secret_value() if settings.hf_token else None
        try:
            path = Path(
                snapshot_download(
                    name,
                    revision=known or revision,
                    cache_dir=settings.download_dir,
                    token=secret,
                    ignore_patterns=ignored,
                )
            )
        except Exception as error:  # noqa: BLE001 the hub's client raises many classes
            # Without the error's own chain: it may quote the token.
            told = _without(str(error), secret or get_token())
            asked = f" at revision {revision}" if revision else ""
            raise StartupError(
                f"{name} is not a folder here, and the hub did not deliver it{asked}: {told}"
            ) from None
        if path.parent.name == "snapshots" and known is None:
            self._commits[name, revision] = path.name
            logger.info("%s is at commit %s, in %s", name, path.name, path)
        return path


def is_hub_name(name: str) -> bool:
    """Whether it is `organisation/name`, and nothing here has that path."""
    path = Path(name).expanduser()
    return (
        not path.exists()
        and name.count("/") == 1
        and not path.parent.exists()
        and not name.startswith(("/", ".", "~"))
    )


def _extra(settings: EngineSettings) -> dict[str, Any]:
    return settings.model_extra or {}


def _without(text: str, token: str | None) -> str:
    """The text in one line, and without tokens."""
    for secret in filter(None, (token, (token or "").strip())):
        text = text.replace(secret, "***")
    return " ".join(_TOKENS.sub("***", text).split())


def _check(name: str, path: Path) -> None:
    """Raises StartupError when it is no folder, or holds nothing to serve."""
    if not path.is_dir():
        raise StartupError(
            f"{name} is not a folder; give a model folder or a hub name like organisation/name."
        )
    if not (path / "config.json").is_file():
        raise StartupError(f"{name} has no config.json, so it is not a model folder.")
    if not any(path.glob("*.safetensors")):
        raise StartupError(
            f"{name} has no *.safetensors weights; convert the checkpoint to safetensors first."
        )
