"""The plan of a run: what is chosen, foretold and refused, from headers alone."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from io import StringIO
from math import prod
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from packhorse.quantize import formats
from packhorse.quantize.errors import BadInput, QuantizeError, Unsupported
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import FAMILIES
from packhorse.quantize.numerics.grid import round_to_nearest
from packhorse.quantize.plan.host import Host, this_host
from packhorse.quantize.plan.planner import Plan, plan
from packhorse.quantize.settings import CHANNEL, Settings

AMX = Host(amx=True, avx512=True, avx512_bf16=True, cuda_capability=None, flops_per_s=1e11)
AVX2 = replace(AMX, amx=False, avx512=False, avx512_bf16=False)
BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def write_headers(
    folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, object], dtype: str = "BF16"
) -> Checkpoint:
    """A checkpoint of any size that takes no room: its weights are a hole in the file."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


def llama(
    folder: Path,
    *,
    hidden: int = 256,
    inner: int = 768,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 32,
    blocks: int = 2,
    vocab: int = 512,
    dtype: str = "BF16",
    **config: object,
) -> Checkpoint:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for index in range(blocks):
        linears = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in linears.items()}
    words = {
        "model_type": "llama", "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "num_hidden_layers": blocks,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return write_headers(folder / "model", shapes, {**words, **config}, dtype)


def planned(source: Checkpoint, method: str = "rtn", host: Host = AMX, **options: object) -> Plan:
    settings = Settings(str(source.folder), Path("out"), method, **options)  # type: ignore[arg-type]
    return plan(settings, source, FAMILIES.get(str(source.config["model_type"])), host=host)


@pytest.mark.parametrize(
    ("method", "scheme", "symmetric", "group_size"),
    [
        ("gptq", "W4A16", True, 128),
        ("awq", "W4A16", False, 128),
        ("rtn", "W4A16", True, 128),
        ("int8", "W8A8", True, CHANNEL),
        ("fp8", "FP8 (W8A8)", True, CHANNEL),
    ],
)
def test_defaults(
    tmp_path: Path, method: str, scheme: str, symmetric: bool, group_size: int
) -> None:
    made = planned(llama(tmp_path), method)
    assert (str(made.scheme), made.group_size, made.format) == (
        scheme, group_size, "compressed-tensors"
    )  # fmt: skip
    assert made.scheme.weights.symmetric is symmetric
    assert made.ignored == ("lm_head",)
    assert len(made.linears) == 14
    assert made.kv is False
    assert made.convert_to is None
    assert formats.make(made.format, made.scheme).scheme == made.scheme


REFUSED: dict[str, tuple[dict[str, object], type[QuantizeError], str]] = {
    "method": ({"method": "squeezellm"}, BadInput, "--method squeezellm is not known; choose.*rtn"),
    "format": ({"format": "gguf"}, BadInput, "--format gguf is not known; choose one of compr"),
    "target": ({"targets": ("cpu", "tpu")}, BadInput, "--target tpu: give cpu or cuda"),
    "no target": ({"targets": ()}, BadInput, "give cpu or cuda"),
    "kv": ({"kv": "int4"}, BadInput, "--kv int4 is not known; give fp8"),
    "bits": ({"bits": 3}, BadInput, "--bits 3: rtn takes 4 or 8"),
    "bits of awq": ({"method": "awq", "bits": 8}, BadInput, "--bits 8: awq takes 4"),
    "bits of int8": ({"method": "int8", "bits": 4}, BadInput, "--bits 4: int8 takes 8"),
    "weights of 8 bits on CPU": ({"method": "gptq", "bits": 8}, Unsupported, "use --method int8"),
    "8 bits asym": ({"bits": 8, "symmetric": False, "targets": ("cuda",)}, Unsupported, "drop"),
    "group size": ({"group_size": 48}, BadInput, "--group-size 48: vLLM loads groups of 32, 64"),
    "no group size": ({"group_size": 0}, BadInput, "--group-size 0: vLLM loads"),
    "groups of int8": ({"method": "int8", "group_size": 64}, BadInput, "one scale per output"),
    "groups of fp8": ({"method": "fp8", "group_size": -1}, BadInput, "one scale per output"),
    "asymmetric int8": ({"method": "int8", "symmetric": False}, BadInput, "always symmetric"),
    "asymmetric fp8": ({"method": "fp8", "symmetric": False}, BadInput, "always symmetric"),
    "asymmetric gptq": (
        {"method": "gptq", "format": "gptq", "symmetric": False}, Unsupported,
        "GPTQ loader takes symmetric only: use --format compressed-tensors",
    ),
    "awq method as gptq": ({"method": "awq", "format": "gptq"}, Unsupported, "ask for --symmetric"),
    "symmetric awq": ({"format": "awq"}, Unsupported, "4 bits symmetric.*asymmetric only"),
    "8-bit awq": ({"format": "awq", "bits": 8, "targets": ("cuda",)}, Unsupported, "8 bits symm"),
    "awq rows": ({"method": "awq", "format": "awq", "group_size": -1}, Unsupported, "name 32, 64"),
    "int8 as gptq": ({"method": "int8", "format": "gptq"}, Unsupported, "cannot hold int8"),
    "fp8 as awq": ({"method": "fp8", "format": "awq"}, Unsupported, "cannot hold fp8"),
    "kv as gptq": ({"format": "gptq", "kv": "fp8"}, Unsupported, "drops the scales"),
    "kv as awq": ({"method": "awq", "format": "awq", "kv": "fp8"}, Unsupported, "drops the scales"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_cannot_be(tmp_path: Path, case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        planned(llama(tmp_path), **{"method": "rtn", **options})  # type: ignore[arg-type]


def test_layouts_that_are_not_the_default(tmp_path: Path) -> None:
    source = llama(tmp_path)
    assert planned(source, "gptq", format="gptq", group_size=CHANNEL).group_size == CHANNEL
    assert planned(source, "awq", format="awq").format == "awq"
    assert planned(source, "rtn", format="awq", symmetric=False).format == "awq"
    assert planned(source, "awq", symmetric=True).scheme.weights.symmetric
    assert not planned(source, "gptq", symmetric=False).scheme.weights.symmetric
    for method in ("gptq", "rtn"):
        assert str(planned(source, method, bits=8, targets=("cuda",)).scheme) == "W8A16"


def test_kv_scales_need_a_head_size_that_the_cpu_takes(tmp_path: Path) -> None:
    made = planned(llama(tmp_path / "fits"), "int8", kv="fp8")
    assert made.kv
    assert made.needs_text
    odd = llama(tmp_path / "odd", heads=4, kv_heads=4, head_dim=80)
    with pytest.raises(Unsupported, match=r"heads of 80.*multiple of 32"):
        planned(odd, "int8", kv="fp8")
    assert planned(odd, "int8", kv="fp8", targets=("cuda",)).kv
    silent = llama(tmp_path / "silent")
    silent.config |= {"head_dim": None, "num_attention_heads": None}
    with pytest.raises(Unsupported, match="does not give the head size"):
        planned(silent, "int8", kv="fp8")


def test_checkpoints_that_cannot_be(tmp_path: Path) -> None:
    ready = llama(tmp_path / "ready", quantization_config={"quant_method": "awq"})
    with pytest.raises(Unsupported, match=r"quantized already \(awq\); start from the original"):
        planned(ready)
    short = llama(tmp_path / "short", num_hidden_layers=3)
    with pytest.raises(BadInput, match="speaks of 3 blocks, the weights hold 2"):
        planned(short)
    for sizes in ({"inner": 200}, {"hidden": 264}):
        odd = llama(tmp_path / str(sizes), **sizes)  # type: ignore[arg-type]
        with pytest.raises(Unsupported, match=r"\d+ x \d+; vLLM's kernels need multiples of 32"):
            planned(odd)


def test_a_missing_or_unknown_weight_is_seen_at_once(tmp_path: Path) -> None:
    whole = llama(tmp_path)
    shapes = {name: tuple(whole.shape_and_dtype(name)[0]) for name in whole.names()}
    gate = "model.layers.1.mlp.gate_proj.weight"
    less = {name: shape for name, shape in shapes.items() if name != gate}
    with pytest.raises(BadInput, match=f"no tensor {gate}"):
        planned(write_headers(tmp_path / "less", less, whole.config))
    more = {**shapes, "model.layers.1.mlp.experts.gate_up": (8, 64, 64)}
    with pytest.raises(Unsupported, match="does not know how to treat"):
        planned(write_headers(tmp_path / "more", more, whole.config))


def test_group_size_falls_back_only_where_none_is_named(tmp_path: Path) -> None:
    source = llama(tmp_path, inner=320)
    made = planned(source)
    assert made.group_size == 64
    assert made.notes[0] == "group size 64 instead of 128: it divides all layers"
    with pytest.raises(
        BadInput, match=r"128 does not divide the 320 inputs of .*0\.mlp\.down_proj; 64, 32 and -1"
    ):
        planned(source, group_size=128)
    assert planned(source, group_size=32).group_size == 32
    assert planned(source, group_size=CHANNEL).scheme.weights.group_size is None
    assert planned(llama(tmp_path / "narrow", inner=352)).group_size == 32


@pytest.mark.parametrize(
    ("stored", "declared", "noted"),
    [
        ("F16", "float16", "F16"),
        ("F32", "float32", "F32"),
        ("BF16", "float16", "F16"),  # vLLM would run it in float16, and abort
        ("BF16", "bfloat16", None),
        ("BF16", None, None),
    ],
)
def test_w8a8_becomes_bfloat16(
    tmp_path: Path, stored: str, declared: str | None, noted: str | None
) -> None:
    source = llama(tmp_path, dtype=stored, torch_dtype=declared)
    for method in ("int8", "fp8"):
        made = planned(source, method)
        assert made.convert_to == ("bfloat16" if noted else None)
        if noted:
            assert f"converted from {noted} to bfloat16" in made.notes[0]
    assert planned(source, "rtn").convert_to is None


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {}),
        ("rtn", {"symmetric": False, "group_size": 32}),
        ("rtn", {"group_size": CHANNEL}),
        ("rtn", {"bits": 8, "targets": ("cuda",)}),
        ("rtn", {"format": "gptq"}),
        ("awq", {"format": "awq"}),
        ("int8", {}),
        ("fp8", {}),
        ("int8", {"kv": "fp8"}),
    ],
)
def test_the_size_is_foretold_within_three_per_cent(
    tiny_checkpoint: Path, tmp_path: Path, method: str, options: dict[str, object]
) -> None:
    source = Checkpoint(tiny_checkpoint)
    made = planned(source, method, **options)
    layout = formats.make(made.format, made.scheme)
    scale_dtype = torch.float32 if made.scheme.activation_bits == 8 else torch.bfloat16
    written = {}
    for name in source.names():
        prefix, tensor = name.removesuffix(".weight"), source.get(name)
        if prefix in made.linears:
            codes = round_to_nearest(tensor, made.scheme.weights, scale_dtype=scale_dtype)
            written |= layout.tensors(prefix, codes)
        else:
            written[name] = tensor
    if made.kv:
        written |= {
            f"model.layers.{index}.self_attn.{part}_scale": torch.ones(1)
            for index in range(3)
            for part in "kv"
        }
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, path)
    assert made.bytes_after == pytest.approx(path.stat().st_size, rel=0.03)


def test_a_large_model(tmp_path: Path) -> None:
    """Llama-3-8B's shapes: sizes as published checkpoints have them."""
    source = llama(
        tmp_path, hidden=4096, inner=14336, heads=32, kv_heads=8, head_dim=128, blocks=32,
        vocab=128256,
    )  # fmt: skip
    made = planned(source, "gptq")
    assert made.bytes_before == pytest.approx(16.06e9, rel=0.01)
    assert made.bytes_after == pytest.approx(5.70e9, rel=0.02)
    assert made.tensor_parallel == (1, 2, 4, 8)
    # Embeddings and head 2.1, a block 0.9, a Hessian of 14336 inputs and its factor 1.6, copies of
    # a weight 0.9, a batch in the MLP 0.5, hidden states 2.1, what layers are given 4.6.
    assert made.peak_memory_bytes == pytest.approx(13.1e9, rel=0.02)
    assert 3600 < made.seconds < 100 * 3600  # at 0.1 TFLOP/s
    plain = planned(source, "rtn")
    assert plain.peak_memory_bytes < made.peak_memory_bytes
    assert plain.seconds < made.seconds / 10
    assert plain.seconds == planned(source, "rtn", replace(AMX, flops_per_s=2e11)).seconds * 2


@pytest.mark.parametrize(
    ("shape", "group_size", "sizes"),
    [
        ({}, None, (1, 2)),  # down: 768 inputs over 4 ranks are 192, not whole groups of 128
        ({}, 64, (1, 2, 4)),
        ({"inner": 1024}, None, (1, 2)),  # o: 256 inputs over 4
        ({"inner": 1024}, 32, (1, 2, 4, 8)),  # the 4 key heads are copied to 8 ranks
        ({"inner": 1024, "heads": 6, "kv_heads": 6}, 32, (1, 2)),
        ({"inner": 1024, "heads": 8, "kv_heads": 3}, 32, (1,)),
        ({"inner": 1024}, CHANNEL, (1, 2, 4, 8)),
    ],
)
def test_tensor_parallel_sizes(
    tmp_path: Path, shape: dict[str, int], group_size: int | None, sizes: tuple[int, ...]
) -> None:
    source = llama(tmp_path, **shape)  # type: ignore[arg-type]
    assert planned(source, "rtn", group_size=group_size).tensor_parallel == sizes


def test_kernels_and_what_this_host_cannot_serve(tmp_path: Path) -> None:
    source = llama(tmp_path)
    both = planned(source, "gptq").kernels
    assert both == {
        "cpu": "W4A8 on this host (AMX; VLLM_CPU_INT4_W4A8=0 for W4A16)",
        "cuda": "Machete (cc 9.0) or Marlin (cc >= 7.5)",
    }
    assert "is set" in planned(source, "gptq", replace(AMX, int4_w4a8=False)).kernels["cpu"]
    half = llama(tmp_path / "half", dtype="F16")
    assert planned(half, "gptq").kernels["cpu"].startswith("W4A16")
    assert not planned(source, "rtn").notes + planned(source, "int8", AVX2).notes
    assert "no AVX-512" in planned(source, "rtn", AVX2).notes[0]
    assert not planned(source, "rtn", AVX2, targets=("cuda",)).notes
    slow, units = planned(source, "fp8").notes
    assert ("slower than INT8" in slow, "below compute capability 8.9" in units) == (True, True)
    assert planned(source, "fp8", targets=("cpu",)).notes == [slow]
    assert planned(source, "fp8", targets=("cuda",)).notes == [units]
    assert "verify on a GPU" in str(planned(source, "fp8").not_checkable_here)
    assert "no GPU" in str(planned(source, "gptq", bits=8, targets=("cuda",)).not_checkable_here)
    assert (
        planned(source, "gptq").not_checkable_here
        is planned(source, "gptq", AVX2).not_checkable_here
        is None
    )
    assert "unpacked on load" in planned(source, "gptq", AVX2).kernels["cpu"]
    assert "no 8-bit KV cache" in str(planned(source, "int8", AVX2, kv="fp8").not_checkable_here)
    old_gpu = replace(AMX, cuda_capability=(7, 0))
    assert "compute capability 7.0" in planned(source, "rtn", old_gpu).notes[0]


def test_a_tied_head_is_noted(tmp_path: Path) -> None:
    assert "lm_head" in planned(llama(tmp_path, tie_word_embeddings=True)).notes[-1]


def test_an_unknown_model_may_only_be_rounded(tmp_path: Path) -> None:
    source = llama(tmp_path, model_type="rwkv9")
    made = planned(source, "rtn")
    assert len(made.linears) == 14
    assert made.ignored == ("lm_head",)
    assert made.tensor_parallel == (1,)
    assert "'rwkv9' is not known" in made.notes[0]
    for options in ({"method": "gptq"}, {"method": "int8"}, {"method": "rtn", "kv": "fp8"}):
        with pytest.raises(
            Unsupported, match=r"'rwkv9' is not known; known are .*llama.*method rtn"
        ):
            planned(source, **options)  # type: ignore[arg-type]


def test_what_is_no_linear_layer_of_a_block_is_left_alone(tmp_path: Path) -> None:
    block = {
        "attn.qkv.weight": (96, 64), "attn.qkv.bias": (96,), "mlp.gate.weight": (4, 64),
        "ln_1.weight": (64,), "rel_embed.weight": (32, 64), "conv1d.weight": (64, 1, 4),
        "mlp.experts.0.w1.weight": (64, 64),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {f"m.h.0.{name}": shape for name, shape in block.items()}
    shapes |= {"m.wte.weight": (128, 64), "m.proj.weight": (64, 64)}
    shapes |= {"vision_tower.layers.0.fc.weight": (64, 64)}
    made = planned(write_headers(tmp_path / "m", shapes, {"model_type": "other"}))
    assert made.linears == ("m.h.0.attn.qkv", "m.h.0.mlp.experts.0.w1")
    assert made.ignored == (
        "lm_head", "m.h.0.mlp.gate", "m.proj", "vision_tower.layers.0.fc"
    )  # fmt: skip


def test_an_unknown_model_without_plain_linear_layers_is_refused(tmp_path: Path) -> None:
    shapes = {"m.layers.0.mlp.experts": (8, 64, 64), "m.layers.0.attn.qkv.weight": (96, 64)}
    source = write_headers(tmp_path / "experts", shapes, {"model_type": "other"})
    with pytest.raises(Unsupported, match=r"such as m\.layers\.0\.mlp\.experts"):
        planned(source)
    transposed = write_headers(
        tmp_path / "gpt2", {"h.0.attn.c_attn.weight": (64, 192)}, {"model_type": "gpt2"}
    )
    with pytest.raises(Unsupported, match="transposed"):
        planned(transposed)


def test_a_plan_can_be_shown_and_kept(tmp_path: Path) -> None:
    made = planned(llama(tmp_path, inner=320), "gptq")
    document = json.loads(json.dumps(made.as_json()))
    assert document["scheme"] == "W4A16"
    assert document["bytes"]["after"] == made.bytes_after
    assert document["tensor_parallel"] == [1]
    console = Console(file=StringIO(), width=120, record=True)
    console.print(made.as_table())
    text = console.export_text()
    parts = ("W4A16, groups 64, symmetric", "estimate", "kernel on cuda", "instead of 128")
    assert all(part in text for part in parts)


def test_this_host_is_measured() -> None:
    assert this_host().flops_per_s > 1e8
