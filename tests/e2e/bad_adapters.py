"""Adapters that a server must refuse, each with a word that its error must have."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.conftest import DEMO

ADAPTERS = DEMO / "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _config(path: Path, **fields: Any) -> None:
    known = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**known, **fields}))


def _tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def _grow_rank(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        side = 0 if "lora_A" in name else 1
        tensors[name] = tensor.repeat_interleave(4, dim=side).contiguous()


def _narrow(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensors[name] = tensor[:, :128].contiguous()


def _not_a_number(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _huge_header(path: Path) -> None:
    with (path / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 2**40))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank": (lambda p: (_config(p, r=32), _tensors(p, _grow_rank)), "32"),
    "base": (lambda p: _tensors(p, _narrow), "128"),
    "no-config": (lambda p: (p / CONFIG).unlink(), CONFIG),
    "no-weights": (lambda p: (p / WEIGHTS).unlink(), WEIGHTS),
    "truncated": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-50]), "trunc"),
    "nan": (lambda p: _tensors(p, _not_a_number), "lora_"),
    "header": (_huge_header, "header"),
    "pickle": (lambda p: (p / WEIGHTS).rename(p / "adapter_model.bin"), "safetensors"),
    "link": (
        lambda p: ((p / WEIGHTS).unlink(), (p / WEIGHTS).symlink_to(ADAPTERS / "clinic" / WEIGHTS)),
        "link",
    ),
    "dora": (lambda p: _config(p, use_dora=True), "DoRA"),
    "ia3": (lambda p: _config(p, peft_type="IA3"), "IA3"),
    "saved": (lambda p: _config(p, modules_to_save=["lm_head"]), "modules_to_save"),
}
