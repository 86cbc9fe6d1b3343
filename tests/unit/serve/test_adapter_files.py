"""Folders and files that are not what they should be: links, pipes, pickles, damage."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packhorse.serve.adapters import folders
from packhorse.serve.adapters.base_layers import linear_layers
from packhorse.serve.adapters.formats import AdapterLimits, check
from packhorse.serve.errors import Invalid
from tests.conftest import DEMO
from tests.unit.serve.adapter_makers import A0, CONFIG, LIMITS, WEIGHTS, made


def headed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, too few"),
        (b"abc", "has 3 bytes, too few"),
        (b"\x80\x02}q\x00." + bytes(20), "says that its header has .* are the limit"),
        ((16 * 2**20 + 1).to_bytes(8, "little") + b"{}", "16777217 bytes, and 16777216 are"),
        (
            (100).to_bytes(8, "little") + b"{}",
            "ends within its header, after 10 bytes: it is trunc",
        ),
        (headed(b"{"), "not JSON"),
        (headed(b"\xff"), "not JSON"),
        (headed(b"[" * 100_000), "not JSON"),
        (headed([]), "not a JSON object"),
        (headed(b'{"a": 1, "a": 2}'), "names something twice"),
        (headed({"a": 1}), "describes the tensor 'a' in no known way"),
        (headed({"a": entry(0, 4, [-1])}, bytes(4)), "no known way"),
        (headed({"a": entry(0, 4, [True])}, bytes(4)), "no known way"),
        (headed({"a": entry(0, 4, [1.0])}, bytes(4)), "no known way"),
        (headed({"a": entry(4, 0)}, bytes(4)), "no known way"),
        (headed({"a": entry(0, 4, dtype=32)}, bytes(4)), "no known way"),
        (headed({"a": entry(0, 4, [2])}, bytes(4)), "4 bytes, and F32 of shape .* takes 8"),
        (headed({"a": entry(0, 4)}, bytes(3)), "its tensors end at .*: it is truncated"),
        (headed({"a": entry(0, 4)}, bytes(5)), "1 more than its tensors take"),
        (headed({"a": entry(0, 4), "b": entry(3, 7)}, bytes(7)), "'b' overlaps with"),
        (headed({"a": entry(0, 4), "b": entry(5, 9)}, bytes(9)), "'b' leaves a gap after"),
        (headed({"a": entry(4, 8)}, bytes(8)), "'a' leaves a gap after"),
        (headed({A0: entry(0, 4, dtype="F4")}, bytes(4)), "type 'F4'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_weight_file_that_is_not_whole(tmp_path: Path, content: bytes, message: str) -> None:
    source = made(tmp_path / "source")
    (source / WEIGHTS).write_bytes(content)
    with pytest.raises(Invalid, match=message):
        check(source, LIMITS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.bin", "pickle can run any code.*safe_serialization=True"),
        ("adapter_model.pt", "pickle can run any code"),
        ("weights.safetensors", "has no adapter_model.safetensors; give"),
    ],
)
def test_weights_in_another_file(tmp_path: Path, name: str, message: str) -> None:
    source = made(tmp_path / "source")
    (source / WEIGHTS).rename(source / name)
    with pytest.raises(Invalid, match=message):
        check(source, LIMITS)


def linked(name: str, *, out: bool) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        target = (source.parent if out else source) / "target"
        if name == "runs":
            target.mkdir()
        else:
            (source / name).rename(target)
        (source / name).symlink_to(target)

    return change


def replaced(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / name).unlink(missing_ok=True)
        make(source / name)

    return change


def a_deep_link(source: Path) -> None:
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "c").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (linked(WEIGHTS, out=True), "'adapter_model.safetensors' is a link out of .*cp -rL"),
        (linked(CONFIG, out=True), "'adapter_config.json' is a link out of"),
        (linked("runs", out=True), "'runs' is a link out of"),
        (a_deep_link, "'a/b/c' is a link out of"),
        (replaced(WEIGHTS, os.mkfifo), "'adapter_model.safetensors' in .* not a regular file"),
        (replaced("pipe", os.mkfifo), "'pipe' in .* not a regular file"),
        (replaced(WEIGHTS, Path.mkdir), "adapter_model.safetensors in .* not a regular file"),
        (replaced(CONFIG, Path.mkdir), "adapter_config.json in .* not a regular file"),
        (shutil.rmtree, "is not a folder"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_files_that_are_none(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    source = made(tmp_path / "source")
    change(source)
    with pytest.raises(Invalid, match=message):
        check(source, LIMITS)


def test_a_folder_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_MAX_ENTRIES", 4)
    source = made(tmp_path / "source")
    (source / "runs").mkdir()
    (source / "runs" / "1").touch()
    assert check(source, LIMITS)
    (source / "runs" / "2").touch()
    with pytest.raises(Invalid, match="more than 4 files; put the adapter's own"):
        check(source, LIMITS)


@pytest.mark.parametrize("name", ["clinic", "ledger-adalora"])
def test_damage_is_met_with_nothing_but_invalid(tmp_path: Path, name: str) -> None:
    limits = AdapterLimits(16, linear_layers(DEMO / "model"), 2**24)
    contents = {file: (DEMO / "adapters" / name / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    header_bytes = int.from_bytes(contents[WEIGHTS][:8], "little")
    randomly = random.Random(1)
    refused = 0
    for _ in range(300):
        damaged = {file: bytearray(content) for file, content in contents.items()}
        file = randomly.choice([CONFIG, WEIGHTS])
        end = len(damaged[file]) if file == CONFIG else 8 + header_bytes
        for _ in range(randomly.choice([1, 2, 5])):
            damaged[file][randomly.randrange(end)] = randomly.choice(b'0123456789[]{}:,"\x00\xff')
        for path, content in damaged.items():
            (tmp_path / path).write_bytes(content)
        try:
            check(tmp_path, limits)
        except Invalid:
            refused += 1
    assert 200 < refused < 300
