"""What goes wrong while an adapter is copied leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from packhorse.serve.adapters.formats import check, write
from packhorse.serve.errors import Invalid, Unavailable
from tests.unit.serve.adapter_makers import LIMITS, Q0, WEIGHTS, ada, made, renamed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_a_diverged_training(tmp_path: Path, kind: str, dtype: torch.dtype, value: float) -> None:
    adapter: dict[str, Any] = {"tensors": renamed()} if kind == "lora" else ada()
    tensors = {name: tensor.to(dtype) for name, tensor in adapter.pop("tensors").items()}
    broken = f"base_model.model.{Q0}.lora_B" + (".weight" if kind == "lora" else "")
    tensors[broken][-1, -1] = value
    checked = check(made(tmp_path / "source", tensors, **adapter), LIMITS)
    (tmp_path / "copy").mkdir()
    with pytest.raises(Invalid, match=f"'{broken}' holds a NaN or an infinity.*learning rate"):
        write(checked, tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_an_overflow_while_folding(tmp_path: Path) -> None:
    adapter = ada()
    for tensor in adapter["tensors"].values():
        tensor *= 1e30
    checked = check(made(tmp_path / "source", **adapter), LIMITS)
    (tmp_path / "copy").mkdir()
    with pytest.raises(Invalid, match="above what float32 holds"):
        write(checked, tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def shorter(source: Path) -> None:
    os.truncate(source / WEIGHTS, 100)


def other_header(source: Path) -> None:
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(data.replace(b'"F32"', b'"U32"'))


def relinked(source: Path) -> None:
    (source / WEIGHTS).rename(source.parent / "moved")
    (source / WEIGHTS).symlink_to(source.parent / "moved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorter, "has changed while it was read"),
        (other_header, "has changed while it was read"),
        (lambda source: (source / WEIGHTS).unlink(), "has changed while it was read"),
        (relinked, "is a link out of"),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_a_source_that_changes_after_its_check(
    tmp_path: Path,
    kind: str,
    change: Callable[[Path], None],
    message: str,
) -> None:
    adapter = {} if kind == "lora" else ada()
    source = made(tmp_path / "source", **adapter)
    checked = check(source, LIMITS)
    change(source)
    (tmp_path / "copy").mkdir()
    with pytest.raises(Invalid, match=message):
        write(checked, tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    checked = check(made(tmp_path / "source"), LIMITS)
    (tmp_path / "copy").mkdir()

    def full(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    message = rf"store \({re.escape(str(tmp_path))}\) is full: \d+ bytes are free, and .* takes \d"
    with pytest.raises(Unavailable, match=message):
        write(checked, tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_a_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real error, from a device that is always full."""
    checked = check(made(tmp_path / "source"), LIMITS)
    (tmp_path / "copy").mkdir()
    real = os.open

    def to_full(path: Any, flags: int, mode: int = 0o777) -> int:
        return real("/dev/full" if flags & os.O_EXCL else path, flags & ~os.O_EXCL, mode)

    monkeypatch.setattr(os, "open", to_full)
    with pytest.raises(Unavailable, match="is full"):
        write(checked, tmp_path / "copy")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    checked = check(made(tmp_path / "source"), LIMITS)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / WEIGHTS).write_text("mine")
    with pytest.raises(FileExistsError):
        write(checked, tmp_path / "copy")
    assert (tmp_path / "copy" / WEIGHTS).read_text() == "mine"
