"""Runs that are cut short, at any moment and for any reason: what they leave, and that they go on
to the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from packhorse.quantize.calibration.activation_store import ActivationStore
from packhorse.quantize.errors import BadInput, OutOfMemory
from packhorse.quantize.model.checkpoint import REPORT, Checkpoint, sha256_of
from packhorse.quantize.output import workspace
from packhorse.quantize.output.workspace import Workspace
from packhorse.quantize.run import run
from packhorse.quantize.settings import Settings
from tests.conftest import DEMO
from tests.unit.quantize.test_pipeline import LITTLE, made

KILLS = 5
# Imports once, which takes most of a run's time, and is a fork of itself for every run. None comes
# to its end, however fast the machine is.
FORKS = """
import json, os, sys, time
from pathlib import Path
from transformers.models.llama import modeling_llama
from packhorse.quantize.run import run
from packhorse.quantize.settings import Settings
from packhorse.quantize.output.workspace import Workspace

def publish(work):
    print("at its end", flush=True)
    time.sleep(600)

Workspace.publish = publish

def progress(label, steps):
    print(label, flush=True)
    return lambda done: print(label, done, flush=True)

for line in sys.stdin:
    model, out, options = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            print(os.getpid(), flush=True)
            run(Settings(model, Path(out), **options), progress)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""
# Little text: bytes are compared, whatever they are worth.
GPTQ: dict[str, Any] = {**LITTLE, "method": "gptq", "calibration_tokens": 1024}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("llama", tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def whole(model: Path) -> str:
    """The digest of a run that nothing cut short."""
    return quantized(model, model.parent / "whole")


def quantized(model: Path, out: Path, **different: Any) -> str:
    run(Settings(str(model), out, **{**GPTQ, **different}), lambda *_: lambda _: None)
    return sha256_of(Checkpoint(out).weight_files())


@pytest.fixture
def forks() -> Iterator[subprocess.Popen[str]]:
    """Runs each line of its input, as FORKS says."""
    command = [sys.executable, "-c", FORKS]
    # One thread: OpenMP's own do not survive a fork.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process


@pytest.mark.timeout(300)
def test_kills_at_random_moments_end_in_the_same_bytes(
    model: Path, whole: str, tmp_path: Path, forks: subprocess.Popen[str]
) -> None:
    """SIGKILL some time after a random layer; each run goes on where the one before was killed."""
    rng = random.Random(7)
    out = tmp_path / "out"
    options = {**GPTQ, "calibration": str(GPTQ["calibration"]), "resume": True}
    steps = [0]
    assert forks.stdin is not None
    assert forks.stdout is not None
    for _ in range(KILLS):
        print(json.dumps([str(model), str(out), options]), file=forks.stdin, flush=True)
        running = int(forks.stdout.readline())
        left = rng.randrange(1, 9)
        while left >= 0 and (line := forks.stdout.readline()) != "at its end\n":
            assert line not in ("", "ended\n"), "the run ended by itself"
            left -= line.startswith("quantizing layers")
        time.sleep(rng.random() * 0.05)  # any moment of a layer's work, or of what is written then
        os.kill(running, signal.SIGKILL)
        while (line := forks.stdout.readline()) != "ended\n":
            assert line, "the process that forks has ended"
        assert not out.exists()
        manifest = tmp_path / ".out.partial" / "manifest.json"
        steps.append(len(json.loads(manifest.read_text())["steps"]) if manifest.exists() else 0)
        assert steps == sorted(steps)
    assert 0 < steps[-1] <= 5, steps
    assert quantized(model, out, resume=True) == whole
    report = json.loads((out / REPORT).read_text())
    assert len(report["layers"]) == 4 * 7
    assert f"resumed after {steps[-1]} of its steps" in report["notes"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def half(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run was interrupted (Ctrl-C) after two of its five steps."""
    out = tmp_path / "out"
    finish = Workspace.finish_step

    def interrupted(work: Workspace, *args: Any) -> None:
        if len(work.steps) == 2:
            raise KeyboardInterrupt
        finish(work, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "finish_step", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            quantized(model, out)
    assert "2 finished steps are kept" in caught.value.__notes__[0]
    assert not out.exists()
    return out


def test_what_was_cut_short_is_never_thrown_away_unasked(
    model: Path, whole: str, half: Path
) -> None:
    for _ in range(2):
        with pytest.raises(BadInput, match=r"cut short after 2 steps.*--resume.*--restart"):
            quantized(model, half)
    assert quantized(model, half, restart=True) == whole


def test_another_setting_or_input_refuses_to_resume_and_says_which(
    model: Path, whole: str, half: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text((DEMO / "calibration.jsonl").read_text() + '{"text": "more"}\n')
    for different, said in [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"method": "awq"}, "method: gptq then, awq now"),
        ({"calibration": text}, "calibration: .*calibration.jsonl.* then, .*text.jsonl"),
    ]:
        with pytest.raises(BadInput, match=said):
            quantized(model, half, resume=True, **different)
    assert quantized(model, half, resume=True) == whole


@pytest.mark.parametrize("name", ["part-00001", "state-00001/00000"])
def test_damaged_files_are_not_gone_on_from(model: Path, half: Path, name: str) -> None:
    path = half.parent / ".out.partial" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match=f"{name} is not as the unfinished run left it"):
        quantized(model, half, resume=True)
    quantized(model, half, restart=True)


def test_another_tokenizer_or_device_is_another_run(
    model: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = model / "tokenizer_config.json"
    before = tokenizer.read_text()
    tokenizer.write_text(before + " ")
    with pytest.raises(BadInput, match=r"side files: .* then, .* now"):
        quantized(model, half, resume=True)
    tokenizer.write_text(before)
    with monkeypatch.context() as patched:
        patched.setattr("packhorse.quantize.run.device_of", lambda _: torch.device("meta"))
        with pytest.raises(BadInput, match="device: cpu then, meta now"):
            quantized(model, half, resume=True)


def test_a_damaged_shard_is_not_published(
    model: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "publish", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantized(model, out)
    shard = tmp_path / ".out.partial/checkpoint/model.safetensors"
    right = shard.read_bytes()
    shard.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(BadInput, match="is not as the unfinished run left it"):
        quantized(model, out, resume=True)
    shard.write_bytes(right)
    assert quantized(model, out, resume=True) == whole


def test_what_came_to_out_meanwhile_is_not_replaced(
    model: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    finish = Workspace.finish_weights

    def meanwhile(work: Workspace) -> None:
        finish(work)
        out.mkdir()
        (out / "precious").write_text("mine")

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "finish_weights", meanwhile)
        with pytest.raises(BadInput, match="exists already"):
            quantized(model, out)
    assert (out / "precious").read_text() == "mine"
    (out / "precious").unlink()
    assert quantized(model, out, resume=True) == whole


def test_a_run_killed_just_behind_its_publication_leaves_nothing_to_resume(
    model: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "close", lambda work: work._lock.close())
        assert quantized(model, out) == whole
    partial = tmp_path / ".out.partial"
    assert (partial / "manifest.json").exists()
    assert quantized(model, out, overwrite=True) == whole
    assert not partial.exists()


def test_an_old_checkpoint_that_came_back_is_not_replaced_unasked(
    model: Path, half: Path, tmp_path: Path
) -> None:
    """Killed between the two renames of a replacement: the old one has its name again."""
    retired = tmp_path / ".out.retired"
    retired.mkdir()
    (retired / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="exists already"):
        quantized(model, half, restart=True)
    assert (half / "config.json").read_text() == "{}"


def test_what_no_step_needs_goes_at_the_next_start(model: Path, whole: str, half: Path) -> None:
    partial = half.parent / ".out.partial"
    (partial / "part-00099").write_text("of a step that was killed")
    (partial / "offload").mkdir()
    (partial / "offload" / "000000").write_text("of a run that was killed")
    with pytest.raises(BadInput, match="cut short"):
        quantized(model, half)
    assert not (partial / "part-00099").exists()
    assert not (partial / "offload").exists()
    assert quantized(model, half, resume=True) == whole


def test_one_run_at_a_time_makes_a_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        Workspace(out, model),
        pytest.raises(BadInput, match=rf"Another run \(process {os.getpid()}\)"),
    ):
        quantized(model, out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_is_finished(
    model: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        real = workspace.save_file

        def full(tensors: Any, path: Path, *args: Any) -> None:
            if "part-00003" in str(path):
                raise OSError(number, os.strerror(number))
            real(tensors, path, *args)

        patched.setattr(workspace, "save_file", full)
        with pytest.raises(BadInput, match=r"disk of .*out is full; make room.*--resume"):
            quantized(model, out)
    assert not out.exists()
    assert quantized(model, out, resume=True) == whole


def test_too_little_memory_is_said(
    model: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*_: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    with monkeypatch.context() as patched:
        patched.setattr(
            "packhorse.quantize.calibration.runner.RunningBlock.record_original", no_more
        )
        with pytest.raises(OutOfMemory, match=r"the plan was for .* GB.*--calibration-tokens"):
            quantized(model, tmp_path / "out")


def test_activations_on_disk_change_nothing(model: Path, whole: str, tmp_path: Path) -> None:
    assert quantized(model, tmp_path / "out", offload_limit_bytes=0) == whole
    assert quantized(model, tmp_path / "half", offload_limit_bytes=750_000) == whole


def test_room_for_activations_on_disk_is_asked_for(
    model: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    needed = []
    for offload_limit_bytes in (10**12, 0):
        with pytest.raises(BadInput, match=r"needs .* bytes of disk") as caught:
            quantized(model, tmp_path / "out", offload_limit_bytes=offload_limit_bytes)
        found = re.search(r"needs ([\d,]+) bytes", str(caught.value))
        assert found
        needed.append(int(found[1].replace(",", "")))
    tokens = json.loads((model.parent / "whole" / REPORT).read_text())["calibration"]["tokens"]
    config = Checkpoint(model).config
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    # Hidden states of both models in float32; in bfloat16 what two norms and four groups are given.
    given = 2 * hidden + (hidden + heads + hidden + inner)
    assert needed[1] - needed[0] == tokens * (2 * 4 * hidden + 2 * given)


def test_the_activation_store_returns_what_was_stored(tmp_path: Path) -> None:
    store = ActivationStore(400, tmp_path / "offload")
    tensors = {("x", number): torch.rand(50) for number in range(5)}
    for key, tensor in tensors.items():
        store.put(key, tensor)
    assert len(list((tmp_path / "offload").iterdir())) == 3
    assert all(store.get(key).equal(tensor) for key, tensor in tensors.items())
    store.put(("x", 4), torch.zeros(1))
    assert store.get(("x", 4)).equal(torch.zeros(1))
    store.drop("x")
    assert not list((tmp_path / "offload").iterdir())
    with pytest.raises(KeyError):
        store.get(("x", 0))
    store.put(("y",), torch.rand(100))
    assert not list((tmp_path / "offload").iterdir())
