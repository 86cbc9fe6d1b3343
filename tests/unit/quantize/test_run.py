"""The pipeline on a small random model: what comes out, is refused, or is left by a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from packhorse.quantize.errors import BadInput, QuantizeError, Unsupported
from packhorse.quantize.model.checkpoint import REPORT, Checkpoint, sha256_of
from packhorse.quantize.output.workspace import Workspace
from packhorse.quantize.quality import dequantized
from packhorse.quantize.run import FREE_MEMORY_BYTES, _offload_limit_bytes, run
from packhorse.quantize.settings import Settings

OF_TWO = "-of-00002.safetensors"


def no_progress(label: str, steps: int) -> Callable[[int], None]:
    return lambda done: None


def quantized(model: Path, out: Path, method: str = "int8", **options: object) -> Path:
    run(Settings(str(model), out, method, quality=False, verify=False, **options), no_progress)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize(("method", "bound"), [("int8", 1e-3), ("rtn", 3e-2)])
def test_the_output_is_complete_and_close(
    tiny_checkpoint: Path, tmp_path: Path, method: str, bound: float
) -> None:
    out = quantized(tiny_checkpoint, tmp_path / "out", method)
    report = json.loads((out / REPORT).read_text())
    assert len(report["layers"]) == 3 * 7
    # Uniform rounding of normal weights errs by step^2 / 12; the bounds leave a factor of about 3.
    assert all(0 < layer["relative_error"] < bound for layer in report["layers"])
    assert report["bytes"]["after"] < report["bytes"]["before"]
    made = Checkpoint(out)
    assert report["weights_sha256"] == sha256_of(made.weight_files())
    assert (out / "generation_config.json").read_text() == '{"eos_token_id": 2}'
    assert not list(tmp_path.glob(".*"))
    logits = [
        dequantized.load(folder)(torch.arange(1, 33)[None]).logits.detach().float()
        for folder in (tiny_checkpoint, out)
    ]
    correlation = torch.corrcoef(torch.stack([part.flatten() for part in logits]))[0, 1]
    assert correlation > 0.98


def test_the_same_run_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    digests = {
        sha256_of(Checkpoint(quantized(tiny_checkpoint, tmp_path / name)).weight_files())
        for name in "ab"
    }
    assert len(digests) == 1


def test_float16_is_converted_because_w8a8_needs_bf16(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "fp16"
    shutil.copytree(tiny_checkpoint, source)
    for path in source.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    out = quantized(source, tmp_path / "out")
    made = Checkpoint(out)
    assert made.config["dtype"] == "bfloat16"
    assert "torch_dtype" not in made.config
    assert made.get("model.norm.weight").dtype == torch.bfloat16
    assert "converted from F16" in json.loads((out / REPORT).read_text())["notes"][0]


def test_group_size_shrinks_to_what_divides_every_layer(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = quantized(tiny_checkpoint, tmp_path / "out", "rtn")
    # The down projection has 192 inputs, which 128 does not divide.
    assert (
        Checkpoint(out).config["quantization_config"]["config_groups"]["group_0"]["weights"][
            "group_size"
        ]
        == 64
    )
    assert "group size 64 instead of 128" in json.loads((out / REPORT).read_text())["notes"][0]


def broken_copy(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write_garbage(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def truncate(folder: Path) -> None:
    path = folder / f"model-00001{OF_TWO}"
    path.write_bytes(path.read_bytes()[:5000])


def put_nan(folder: Path) -> None:
    path = folder / f"model-00001{OF_TWO}"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path)


def set_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], type[QuantizeError], str]] = {
    "no config": (drop("config.json"), BadInput, "has no config.json"),
    "config is not JSON": (write_garbage, BadInput, "cannot be read"),
    "a shard is missing": (drop(f"model-00002{OF_TWO}"), BadInput, "which is not there"),
    "a shard is cut off": (truncate, BadInput, "not a whole safetensors file"),
    "NaN weights": (put_nan, BadInput, "model.norm.weight holds NaN"),
    "fewer blocks than configured": (set_config(num_hidden_layers=4), BadInput, "of 4 blocks"),
    "unknown family": (set_config(model_type="rwkv"), Unsupported, "known are gemma"),
    "quantized already": (
        set_config(quantization_config={"quant_method": "awq"}), Unsupported, "quantized already"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_input_is_refused_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, fault: str
) -> None:
    change, error, message = BROKEN[fault]
    source = broken_copy(tiny_checkpoint, tmp_path / "source", change)
    with pytest.raises(error, match=message):
        quantized(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_an_existing_folder_is_kept_unless_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = quantized(tiny_checkpoint, tmp_path / "out")
    (out / "mark").write_text("old")
    with pytest.raises(BadInput, match="exists already"):
        quantized(tiny_checkpoint, out)
    assert (out / "mark").exists()
    quantized(tiny_checkpoint, out, overwrite=True)
    assert not (out / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_room_is_refused_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = Checkpoint(quantized(tiny_checkpoint, tmp_path / "first")).weight_bytes()

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=count))

    free(size)  # the report needs some, too
    with pytest.raises(BadInput, match=rf"out needs [\d,]+ bytes of disk.* {size:,} are free"):
        quantized(tiny_checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    free(round(size * 2.1))  # parts, and the shard that is made of them
    quantized(tiny_checkpoint, tmp_path / "out")


def test_overwrite_never_takes_the_original_or_a_foreign_folder(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "models" / "source"
    shutil.copytree(tiny_checkpoint, source)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat").write_text("meow")
    for out, message in [(source, "original"), (source.parent, "original"), (photos, "is not a")]:
        with pytest.raises(BadInput, match=message):
            quantized(source, out, overwrite=True)
    assert (photos / "cat").read_text() == "meow"
    assert Checkpoint(source).names()


def test_a_replacement_killed_between_its_renames_is_undone(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = quantized(tiny_checkpoint, tmp_path / "out")
    out.rename(tmp_path / ".out.retired")
    with pytest.raises(BadInput, match="exists already"):
        quantized(tiny_checkpoint, out)
    assert Checkpoint(out).config["quantization_config"]


def test_shards_biases_and_an_untied_head_come_through(tmp_path: Path) -> None:
    config = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=100, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    source, shards = tmp_path / "source", tmp_path / "shards"
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    original = Checkpoint(source)
    with Workspace(shards, source, shard_bytes=20_000) as work:
        work.begin({}, resume=False, restart=False)
        tensors = ({name: original.get(name)} for name in original.names())
        work.finish_step(tensors, dict, tuple)
        work.finish_weights()
        work.write_json("config.json", original.config)
        work.publish()
    assert len(Checkpoint(shards).weight_files()) > 3
    out = Checkpoint(quantized(shards, tmp_path / "out"))
    bias = "model.layers.1.self_attn.q_proj.bias"
    assert out.get(bias).equal(original.get(bias))
    assert out.get("lm_head.weight").equal(original.get("lm_head.weight"))
    assert out.get("model.layers.1.self_attn.q_proj.weight").dtype == torch.int8
    dequantized.load(out.folder)


def test_quality_without_a_tokenizer_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "hello"}')
    settings = Settings(str(tiny_checkpoint), tmp_path / "out", "int8", text_file=text)
    with pytest.raises(BadInput, match="no tokenizer that loads"):
        run(settings, no_progress)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("free", "kept"), [(0, 0), (10**9, 5 * 10**8), (None, FREE_MEMORY_BYTES // 2)]
)
def test_half_of_what_is_free_is_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch, free: int | None, kept: int
) -> None:
    monkeypatch.setattr("packhorse.quantize.run.free_memory_bytes", lambda: free)
    assert _offload_limit_bytes(Settings("model", Path("out"), "gptq")) == kept
    assert _offload_limit_bytes(Settings("model", Path("out"), "gptq", offload_limit_bytes=7)) == 7
