"""Another model, another fingerprint; the same one is read once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from packhorse.serve.cache import model_fingerprint
from packhorse.serve.cache.model_fingerprint import FileDigests, fingerprint_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "config.json").write_text("{}")
    make_old(folder)
    return folder


def make_old(folder: Path) -> None:
    old_s = time.time() - 60
    for path in folder.iterdir():
        os.utime(path, (old_s, old_s))


def of(folder: Path, settings: str = "{}", **environment: str) -> bytes:
    return fingerprint_of([folder], settings, environment, FileDigests(None))


def test_everything_is_in_it(folder: Path) -> None:
    found = [of(folder), of(folder, '{"dtype": 1}'), of(folder, VLLM_CPU_INT4_W4A8="0")]
    (folder / "model.safetensors").write_bytes(bytes(999) + b"\x01")
    found.append(of(folder))
    (folder / "config.json").write_text('{"a": 1}')
    found.append(of(folder))
    (folder / "chat_template.jinja").write_text("{{ x }}")
    found.append(of(folder))
    assert len(set(found)) == len(found)
    (folder / "README.md").write_text("notes")
    (folder / ".hidden").write_text("x")
    assert of(folder) == found[-1]


def test_the_folders_place_is_not(folder: Path) -> None:
    before = of(folder)
    assert of(folder.rename(folder.parent / "elsewhere")) == before


def test_a_file_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "cache/digests.json"
    first = fingerprint_of([folder], "", {}, FileDigests(memory))
    assert len(json.loads(memory.read_text())) == 2

    def never(*_: object) -> None:
        raise AssertionError("it was read again")

    monkeypatch.setattr(model_fingerprint.hashlib, "file_digest", never)
    assert fingerprint_of([folder], "", {}, FileDigests(memory)) == first


def test_a_changed_file_is_read_again(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "digests.json"
    first = fingerprint_of([folder], "", {}, FileDigests(memory))
    (folder / "model.safetensors").write_bytes(bytes(999) + b"\x01")  # of the same size
    make_old(folder)  # and the same times, but for those that the system sets itself
    assert fingerprint_of([folder], "", {}, FileDigests(memory)) != first


def test_what_may_still_change_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    memory = tmp_path / "digests.json"
    (folder / "config.json").write_text("{ }")
    fingerprint_of([folder], "", {}, FileDigests(memory))
    assert [Path(name).name for name in json.loads(memory.read_text())] == ["model.safetensors"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "\xff"])
def test_a_damaged_memory_is_read_anew(folder: Path, tmp_path: Path, content: str) -> None:
    memory = tmp_path / "digests.json"
    memory.write_text(content, encoding="latin-1")
    assert fingerprint_of([folder], "{}", {}, FileDigests(memory)) == of(folder)


def test_a_place_that_cannot_be_written_to_does_no_harm(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    unwritable = FileDigests(tmp_path / "file/digests.json")
    found = fingerprint_of([folder], "", {}, unwritable)
    assert found == fingerprint_of([folder], "", {}, FileDigests(None))
