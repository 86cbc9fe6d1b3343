"""Files put together into shards: nothing changes on the way, also when that is cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.output import workspace
from packhorse.quantize.output.shards import index_of, merge, shards_of
from packhorse.quantize.output.workspace import Workspace


@pytest.mark.parametrize("after", [0, 1])
def test_shards_are_made_again_where_the_last_run_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Killed between the shards, whose parts are gone by then."""
    tensors = {f"t{i}": torch.full((50,), float(i)) for i in range(4)}
    out, source = tmp_path / "out", tmp_path / "source"
    merged = []

    def failing(parts: Any, target: Path) -> None:
        if len(merged) == after:
            target.write_bytes(b"half")
            raise ZeroDivisionError
        merged.append(target)
        merge(parts, target)

    def cut_short() -> None:
        with Workspace(out, source, shard_bytes=700) as work:
            work.begin({"a": 1}, resume=False, restart=False)
            work.finish_step(({name: t} for name, t in tensors.items()), dict, tuple)
            work.finish_weights()

    with monkeypatch.context() as patched:
        patched.setattr(workspace, "merge", failing)
        with pytest.raises(ZeroDivisionError):
            cut_short()
    with Workspace(out, source, shard_bytes=700) as work:
        assert work.begin({"a": 1}, resume=True, restart=False)
        work.finish_weights()
        work.write_json("config.json", {})
        work.publish()
    found = Checkpoint(out)
    assert len(found.weight_files()) == 2
    assert all(found.get(name).equal(tensor) for name, tensor in tensors.items())


def test_merged_files_read_as_their_parts(tmp_path: Path) -> None:
    parts = [
        {"odd": torch.tensor([1, 2, 3], dtype=torch.int8), "a": torch.rand(3)},
        {"half": torch.rand(5).bfloat16(), "f8": torch.rand(3).to(torch.float8_e4m3fn)},
        {"big": torch.arange(7)},
    ]
    paths = [tmp_path / str(number) for number in range(3)]
    for part, path in zip(parts, paths, strict=True):
        save_file(part, path)
    merge(paths, tmp_path / "whole.safetensors")
    found = load_file(tmp_path / "whole.safetensors")
    for name, tensor in {k: t for part in parts for k, t in part.items()}.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].view(torch.uint8).equal(tensor.view(torch.uint8))
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    index = index_of([tmp_path / "whole.safetensors"])
    assert index["metadata"]["total_size"] == 3 + 12 + 10 + 3 + 56
    assert set(index["weight_map"].values()) == {"whole.safetensors"}


def test_shards_stay_below_their_limit() -> None:
    assert shards_of({"a": 5, "b": 5}, 10) == [("model.safetensors", ["a", "b"])]
    assert [members for _, members in shards_of({"a": 5, "b": 6, "c": 20, "d": 1}, 10)] == [
        ["a"], ["b"], ["c"], ["d"]
    ]  # fmt: skip
