"""One model for all engines of a server, and what their results are kept under."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest

from packhorse.serve.cache import model_fingerprint
from packhorse.serve.engine_builder import ENGINES, Builder
from packhorse.serve.engines.echo import EchoEngine
from packhorse.serve.errors import StartupError
from packhorse.serve.metrics import ModelMetrics
from packhorse.serve.settings import Settings
from packhorse.serve.settings.engine import EngineSettings
from tests.conftest import DEMO
from tests.hub import COMMITS, Hub, running_hub

CHANGED = "changed while they were loaded"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    old_s = time.time() - 60
    for path in folder.iterdir():
        os.utime(path, (old_s, old_s))
    return folder


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that engines were built of."""
    folders: list[str] = []

    def build(model: str, name: str, settings: EngineSettings, metrics: ModelMetrics) -> EchoEngine:
        folders.append(model)
        return EchoEngine(settings)

    monkeypatch.setitem(ENGINES, "echo", build)
    return folders


def builder(
    model: object, tmp_path: Path, *, store: bool = False, **engine: Any
) -> tuple[Any, Any]:
    """It, and the cache that it tells."""
    cache: dict[str, Any] = {"digests_file": tmp_path / "digests.json"}
    if store:
        cache |= {"store": "redis://127.0.0.1:1", "secret": "s" * 32}
    settings = Settings.model_validate(
        {"model": str(model), "engine": {"kind": "echo", **engine}, "cache": cache}
    )
    told = SimpleNamespace(fingerprint=b"")
    return Builder(settings, "name", told, {}), told  # type: ignore[arg-type]


def soon(condition: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.005)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set: files are read. Those that are read meanwhile wait."""
    gate = threading.Event()
    read = model_fingerprint.hashlib.file_digest

    def wait(*arguments: Any) -> Any:
        assert gate.wait(60)
        return read(*arguments)

    monkeypatch.setattr(model_fingerprint.hashlib, "file_digest", wait)
    yield gate
    gate.set()


def test_without_a_store_no_weight_is_read(
    folder: Path, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(model_fingerprint.hashlib, "file_digest", never)
    makes, cache = builder(folder, tmp_path)
    makes.build()
    first = cache.fingerprint
    assert len(first) == 32
    makes.build()
    assert cache.fingerprint == first, "the same files: what was kept is right"
    (folder / "model.safetensors").write_bytes(bytes(999) + b"\x01")
    makes.build()
    assert cache.fingerprint != first
    assert not (tmp_path / "digests.json").exists()
    other, others = builder(folder, tmp_path)
    other.build()
    assert others.fingerprint != cache.fingerprint


def test_with_a_store_files_are_read_beside_the_loading(
    folder: Path, tmp_path: Path, built: list[str], gate: threading.Event
) -> None:
    makes, cache = builder(folder, tmp_path, store=True)
    makes.build()  # though nothing can be read yet
    own = cache.fingerprint
    assert len(own) == 32
    gate.set()
    soon(lambda: cache.fingerprint != own)
    other, others = builder(folder, tmp_path / "elsewhere", store=True)
    other.build()
    soon(lambda: others.fingerprint == cache.fingerprint)


def test_what_is_read_late_is_not_told_of_the_next_engine(
    folder: Path, tmp_path: Path, built: list[str], gate: threading.Event
) -> None:
    makes, cache = builder(folder, tmp_path, store=True)
    makes.build()
    (folder / "model.safetensors").write_bytes(bytes(999) + b"\x01")
    makes.build()
    gate.set()
    other, others = builder(folder, tmp_path / "elsewhere", store=True)
    other.build()
    soon(lambda: others.fingerprint == cache.fingerprint)


def shared(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> bytes:
    """The fingerprint by which replicas know it."""
    caplog.clear()
    makes, cache = builder(folder, tmp_path, store=True)
    with caplog.at_level(logging.INFO):
        makes.build()
        soon(lambda: "results are shared" in caplog.text)
    found: bytes = cache.fingerprint
    return found


@pytest.mark.parametrize("store", [False, True])
def test_files_that_change_while_they_are_loaded_are_noticed(
    folder: Path, tmp_path: Path, built: list[str], store: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    known = {shared(folder, tmp_path, caplog)}
    build = ENGINES["echo"]

    def change(*arguments: Any) -> Any:
        (folder / "model.safetensors").write_bytes(bytes(999) + b"\x01")
        return build(*arguments)

    monkeypatch.setitem(ENGINES, "echo", change)
    makes, cache = builder(folder, tmp_path, store=store)
    makes.build()
    assert caplog.text.count(CHANGED) == 1
    monkeypatch.setitem(ENGINES, "echo", build)
    known.add(shared(folder, tmp_path, caplog))
    assert len(known) == 2
    assert cache.fingerprint not in known


def test_files_that_change_while_they_are_read_are_noticed(
    folder: Path, tmp_path: Path, built: list[str], gate: threading.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    makes, cache = builder(folder, tmp_path, store=True)
    makes.build()
    own = cache.fingerprint
    (folder / "model.safetensors").write_bytes(bytes(999) + b"\x01")
    gate.set()
    soon(lambda: cache.fingerprint != own)
    assert CHANGED in caplog.text


def test_files_that_cannot_be_read_are_shared_with_nobody(
    folder: Path, tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise OSError("a bad disk")

    monkeypatch.setattr(model_fingerprint.hashlib, "file_digest", fail)
    makes, cache = builder(folder, tmp_path, store=True)
    makes.build()
    soon(lambda: "no result is shared: a bad disk" in caplog.text)
    assert len(cache.fingerprint) == 32


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        pattern = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        hub.push_folder(COMMITS["one"], DEMO / "model")
        yield hub


def test_a_branch_that_moves_changes_nothing_under_a_server(
    hub: Hub, tmp_path: Path, built: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    makes, cache = builder("organisation/model", tmp_path)
    with caplog.at_level(logging.INFO):
        makes.build()
    assert f"organisation/model is at commit {COMMITS['one']}" in caplog.text
    first, layers = cache.fingerprint, makes.layers()
    assert layers
    hub.push(COMMITS["two"], {"config.json": b"{}", "model.safetensors": b"another"})
    makes.build()
    assert built[0] == built[1]
    assert built[0].endswith(COMMITS["one"])
    assert cache.fingerprint == first
    assert makes.layers() == layers


def test_a_folder_that_is_no_model_is_told(tmp_path: Path) -> None:
    makes, _ = builder(tmp_path, tmp_path)
    with pytest.raises(StartupError, match="has no config"):
        makes.build()
