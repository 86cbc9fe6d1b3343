"""Layouts on disk: what is written is what an independent reader takes out again, and what other
tools write is understood.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packhorse.quantize import formats
from packhorse.quantize.errors import Unsupported
from packhorse.quantize.numerics.grid import (
    QuantizationArgs,
    QuantizedWeight,
    Scheme,
    round_to_nearest,
)

INT8 = Scheme(QuantizationArgs(8), 8)
FP8 = Scheme(QuantizationArgs(8, floating=True), 8)
PACKED = [
    Scheme(QuantizationArgs(bits, group_size, symmetric))
    for bits in (4, 8)
    for group_size in (32, None)
    for symmetric in (True, False)
]
CASES = [
    *(("compressed-tensors", scheme) for scheme in (*PACKED, INT8, FP8)),
    *(("gptq", scheme) for scheme in PACKED if scheme.weights.symmetric),
    *(("awq", scheme) for scheme in PACKED if scheme.weights.bits == 4),
]


def id_of(value: object) -> str:
    if isinstance(value, Scheme):
        args = value.weights
        sym = "sym" if args.symmetric else "asym"
        return f"{value}-{args.group_size or 'channel'}-{sym}".replace(" ", "")
    return str(value)


every_case = pytest.mark.parametrize(("name", "scheme"), CASES, ids=id_of)


def some_codes(
    args: QuantizationArgs,
    *,
    outputs: int = 16,
    inputs: int = 64,
    seed: int = 1,
    dtype: Any = torch.float32,
) -> QuantizedWeight:
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return round_to_nearest(weight_OI, args, scale_dtype=dtype)


def bits_at(word: int, position: int, bits: int) -> int:
    """Of an int32 as a plain integer: code `position` of those packed into it."""
    return ((word & 0xFFFFFFFF) >> (bits * position)) & ((1 << bits) - 1)


# Readers written from the descriptions of the layouts, one weight at a time. They share no code
# with what they check. Each gives the weight of output `o` and input `i`.


def read_packed(tensors: dict[str, Tensor], config: dict[str, Any], o: int, i: int) -> float:
    weights = config["config_groups"]["group_0"]["weights"]
    bits = weights["num_bits"]
    per_word = 32 // bits
    scales = tensors["l.weight_scale"]
    group = i // weights["group_size"] if weights["strategy"] == "group" else 0
    code = bits_at(tensors["l.weight_packed"][o, i // per_word].item(), i % per_word, bits)
    zero = 2 ** (bits - 1)
    if not weights["symmetric"]:
        zeros = tensors["l.weight_zero_point"]
        zero = bits_at(zeros[o // per_word, group].item(), o % per_word, bits)
    return (code - zero) * scales[o, group].item()


def read_whole(tensors: dict[str, Tensor], config: dict[str, Any], o: int, i: int) -> float:
    return tensors["l.weight"][o, i].item() * tensors["l.weight_scale"][o, 0].item()


def read_gptq(tensors: dict[str, Tensor], config: dict[str, Any], o: int, i: int) -> float:
    bits = config["bits"]
    per_word = 32 // bits
    group = tensors["l.g_idx"][i].item()
    code = bits_at(tensors["l.qweight"][i // per_word, o].item(), i % per_word, bits)
    zero = bits_at(tensors["l.qzeros"][group, o // per_word].item(), o % per_word, bits) + 1
    return (code - zero) * tensors["l.scales"][group, o].item()


def read_awq(tensors: dict[str, Tensor], config: dict[str, Any], o: int, i: int) -> float:
    # Outputs 0 to 7 of a word lie at these positions.
    position = [0, 4, 1, 5, 2, 6, 3, 7][o % 8]
    group = 0 if config["group_size"] == -1 else i // config["group_size"]
    code = bits_at(tensors["l.qweight"][i, o // 8].item(), position, 4)
    zero = bits_at(tensors["l.qzeros"][group, o // 8].item(), position, 4)
    return (code - zero) * tensors["l.scales"][group, o].item()


READERS: dict[str, Callable[[dict[str, Tensor], dict[str, Any], int, int], float]] = {
    "pack-quantized": read_packed,
    "int-quantized": read_whole,
    "float-quantized": read_whole,
    "gptq": read_gptq,
    "awq": read_awq,
}


@every_case
def test_an_independent_reader_finds_every_weight(name: str, scheme: Scheme) -> None:
    codes = some_codes(scheme.weights)
    layout = formats.make(name, scheme)
    tensors, config = layout.tensors("l", codes), layout.config(ignore=[], kv_scales=False)
    read = READERS[config["format"] if name == "compressed-tensors" else name]
    wanted_OI = codes.dequantize()
    for output in range(wanted_OI.shape[0]):
        for column in range(wanted_OI.shape[1]):
            # float32 against Python's float64
            assert read(tensors, config, output, column) == pytest.approx(
                wanted_OI[output, column].item(), abs=1e-6
            )


@every_case
def test_shapes_and_dtypes_are_those_of_the_layout(name: str, scheme: Scheme) -> None:
    codes = some_codes(scheme.weights, outputs=16, inputs=64, dtype=torch.bfloat16)
    tensors = formats.make(name, scheme).tensors("a.l", codes)
    bits, groups = scheme.weights.bits, 2 if scheme.weights.group_size else 1
    if name == "gptq":
        wanted = {
            "qweight": ((64 * bits // 32, 16), torch.int32), "g_idx": ((64,), torch.int32),
            "scales": ((groups, 16), torch.bfloat16),
            "qzeros": ((groups, 16 * bits // 32), torch.int32),
        }  # fmt: skip
    elif name == "awq":
        wanted = {
            "qweight": ((64, 2), torch.int32), "scales": ((groups, 16), torch.bfloat16),
            "qzeros": ((groups, 2), torch.int32),
        }  # fmt: skip
    elif scheme.activation_bits == 8:
        kind = torch.float8_e4m3fn if scheme.weights.floating else torch.int8
        wanted = {"weight": ((16, 64), kind), "weight_scale": ((16, 1), torch.bfloat16)}
    else:
        wanted = {
            "weight_packed": ((16, 64 * bits // 32), torch.int32),
            "weight_scale": ((16, groups), torch.bfloat16), "weight_shape": ((2,), torch.int64),
        }  # fmt: skip
        if not scheme.weights.symmetric:
            wanted["weight_zero_point"] = ((16 * bits // 32, groups), torch.int32)
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    assert found == {f"a.l.{key}": value for key, value in wanted.items()}


@given(case=st.sampled_from(CASES), seed=st.integers(0, 2**32), blocks=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_reading_gives_back_what_was_written(
    case: tuple[str, Scheme], seed: int, blocks: int
) -> None:
    name, scheme = case
    layout = formats.make(name, scheme)
    assert (layout.name, layout.scheme) == (name, scheme)
    codes = some_codes(scheme.weights, outputs=8 * blocks, inputs=32 * blocks, seed=seed)
    tensors = layout.tensors("a.b", codes)
    read_layout = formats.of(layout.config(ignore=["lm_head"], kv_scales=False))
    others = ["lm_head.weight", "a.b.bias", "a.self_attn.k_scale"]
    assert read_layout.linears([*tensors, *others]) == ["a.b"]
    read = read_layout.read("a.b", tensors.__getitem__)
    assert read.dequantize().equal(codes.dequantize())
    if name == "awq":  # always with zero points
        assert read_layout.scheme.weights == QuantizationArgs(
            4, scheme.weights.group_size, symmetric=False
        )
    else:
        assert read_layout.scheme == scheme
        assert read.codes_OI.float().equal(codes.codes_OI.float())


@pytest.mark.parametrize("scheme", [*PACKED, INT8, FP8], ids=id_of)
def test_compressed_tensors_own_library_reads_config_and_weights(scheme: Scheme) -> None:
    codes = some_codes(scheme.weights)
    layout = formats.make("compressed-tensors", scheme)
    config = layout.config(ignore=["lm_head"], kv_scales=False)
    parsed = QuantizationConfig.model_validate(json.loads(json.dumps(config)))
    theirs = parsed.config_groups["group_0"]
    assert theirs.targets == ["Linear"]
    assert parsed.ignore == ["lm_head"]
    assert parsed.kv_cache_scheme is None
    assert theirs.weights.num_bits == scheme.weights.bits
    assert theirs.weights.group_size == scheme.weights.group_size
    assert theirs.weights.symmetric == scheme.weights.symmetric
    assert theirs.weights.type == ("float" if scheme.weights.floating else "int")
    activations = theirs.input_activations
    assert (activations is None) == (scheme.activation_bits == 16)
    if activations is not None:
        assert (activations.dynamic, activations.strategy) == (True, "token")
        assert activations.type == theirs.weights.type
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    assert compressor.can_compress(torch.nn.Linear, theirs)
    tensors = {key.removeprefix("l."): value for key, value in layout.tensors("l", codes).items()}
    assert set(tensors) == set(compressor.compression_param_names(theirs))
    if codes.zeros_OG is not None:
        half = 2 ** (scheme.weights.bits - 1)
        zeros_OG = (codes.zeros_OG.int() - half).to(torch.int8)
        packed = pack_to_int32(zeros_OG, scheme.weights.bits, packed_dim=0)
        assert tensors["weight_zero_point"].equal(packed)
    assert compressor.decompress(tensors, theirs)["weight"].float().equal(codes.dequantize())


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_stores_the_middle_minus_one(bits: int) -> None:
    tensors = formats.make("gptq", Scheme(QuantizationArgs(bits))).tensors(
        "l", some_codes(QuantizationArgs(bits))
    )
    assert tensors["l.qzeros"].unique().tolist() == [{4: 0x77777777, 8: 0x7F7F7F7F}[bits]]
    assert tensors["l.g_idx"].unique().tolist() == [0]


def test_scales_of_the_kv_cache_are_announced() -> None:
    config = formats.make("compressed-tensors", INT8).config(ignore=[], kv_scales=True)
    scheme = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "tensor")
    assert (scheme.symmetric, scheme.dynamic) == (True, False)
    for name in ("gptq", "awq"):
        with pytest.raises(Unsupported, match="no place for KV scales; use --format compressed"):
            formats.make(name, Scheme(QuantizationArgs(4))).config(ignore=[], kv_scales=True)


def test_awq_refuses_to_leave_out_more_than_it_was_told() -> None:
    layout = formats.make("awq", Scheme(QuantizationArgs(4, 32, symmetric=False)))
    ignore = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"]
    assert layout.config(ignore=ignore, kv_scales=False)["modules_to_not_convert"] == ignore
    for name, caught in (("model.layers.1.mlp.gate", "gate_proj"), ("v_proj", "qkv_proj")):
        with pytest.raises(Unsupported, match=f"cannot leave out {name} alone: {caught}"):
            layout.config(ignore=[name], kv_scales=False)


@pytest.mark.parametrize(
    ("name", "scheme", "message"),
    [
        ("marlin", INT8, "'marlin' is not known; known are compressed-tensors, gptq, awq"),
        ("gptq", Scheme(QuantizationArgs(4, 32, symmetric=False)), "W4A16, asymmetric"),
        ("gptq", INT8, "gptq cannot hold W8A8"),
        ("gptq", FP8, "gptq cannot hold FP8"),
        ("awq", Scheme(QuantizationArgs(8, 32)), "awq cannot hold W8A16"),
        ("awq", FP8, "awq cannot hold FP8"),
        ("compressed-tensors", Scheme(QuantizationArgs(4), 8), "cannot hold W4A8"),
        ("compressed-tensors", Scheme(QuantizationArgs(8, 32), 8), "one scale a channel"),
        ("compressed-tensors", Scheme(QuantizationArgs(8, None, symmetric=False), 8), "symmetric"),
        (
            "compressed-tensors",
            Scheme(QuantizationArgs(8, 32, floating=True), 8),
            "cannot hold FP8",
        ),
        ("compressed-tensors", Scheme(QuantizationArgs(3, 32)), "cannot hold W3A16"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(name: str, scheme: Scheme, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        formats.make(name, scheme)


# Configs as other tools write them, cut to what matters.

LLM_COMPRESSOR_W4 = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "version": "0.19.0",
    "quantization_status": "compressed", "ignore": ["lm_head"], "kv_cache_scheme": None,
    "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {},
    "config_groups": {"group_0": {
        "format": "pack-quantized", "targets": ["Linear"],
        "input_activations": None, "output_activations": None,
        "weights": {
            "actorder": "static", "block_structure": None, "dynamic": False, "group_size": 32,
            "num_bits": 4, "observer": "memoryless_minmax", "observer_kwargs": {},
            "scale_dtype": None, "strategy": "group", "symmetric": False, "type": "int",
            "zp_dtype": "torch.int8",
        },
    }},
}  # fmt: skip
AUTO_ROUND_W4 = {
    "quant_method": "gptq", "autoround_version": "0.16.1", "bits": 4, "data_type": "int",
    "group_size": 32, "sym": True, "desc_act": False, "damp_percent": 0.01,
    "checkpoint_format": "gptq", "provider": "auto-round", "block_name_to_quantize": "model.layers",
}  # fmt: skip


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy; `weights__x` is the x of group 0's weights, `group__x` that of the group."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    for key, value in changes.items():
        place, _, inner = key.partition("__")
        group = made.get("config_groups", {}).get("group_0", {})
        holder = {"weights": group.get("weights"), "group": group}.get(place, made)
        holder[inner or key] = value
    return made


ASYMMETRIC = Scheme(QuantizationArgs(4, 32, symmetric=False))
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": False}
AUTO_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (LLM_COMPRESSOR_W4, ASYMMETRIC),
        (changed(LLM_COMPRESSOR_W4, weights__symmetric=True), Scheme(QuantizationArgs(4, 32))),
        (
            changed(LLM_COMPRESSOR_W4, weights__strategy="channel", weights__group_size=None),
            Scheme(QuantizationArgs(4, None, symmetric=False)),
        ),
        (AUTO_ROUND_W4, Scheme(QuantizationArgs(4, 32))),
        (changed(AUTO_ROUND_W4, bits=8, group_size=-1), Scheme(QuantizationArgs(8))),
        (changed(AUTO_ROUND_W4, sym=False), ASYMMETRIC),
        (changed(AUTO_ROUND_W4, desc_act=True, group_size=-1), Scheme(QuantizationArgs(4))),
        ({**AUTO_AWQ, "version": "gemm"}, Scheme(QuantizationArgs(4, 128, symmetric=False))),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"},
            Scheme(QuantizationArgs(4, 64, symmetric=False)),
        ),
    ],
)
def test_configs_of_other_tools_are_understood(config: dict[str, Any], scheme: Scheme) -> None:
    assert formats.of(config).scheme == scheme


def test_several_groups_of_one_scheme_are_one_scheme() -> None:
    config = changed(LLM_COMPRESSOR_W4)
    groups = config["config_groups"]
    groups["group_1"] = {**groups["group_0"], "targets": ["re:.*mlp.*"]}
    assert formats.of(config).scheme == ASYMMETRIC
    groups["group_1"]["weights"] = {**groups["group_0"]["weights"], "num_bits": 8}
    kinds = [formats.of(config).scheme_of(f"layers.0.{name}") for name in ("mlp.up", "self.q")]
    assert [kind.weights.bits for kind in kinds] == [8, 4]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "quant_method 'fp8' is not known"),
        ({}, "quant_method None is not known"),
        (changed(LLM_COMPRESSOR_W4, group__format="nvfp4-pack-quantized"), "'nvfp4-pack"),
        (changed(LLM_COMPRESSOR_W4, weights__actorder="group"), "actorder 'group'"),
        (changed(LLM_COMPRESSOR_W4, weights__num_bits=3), "of this kind"),
        (changed(LLM_COMPRESSOR_W4, group__format="int-quantized"), "of this kind"),
        (changed(LLM_COMPRESSOR_W4, weights__strategy="tensor"), "of this kind"),
        (changed(LLM_COMPRESSOR_W4, group__input_activations=STATIC), "these activations"),
        (changed(LLM_COMPRESSOR_W4, config_groups={}), "without config_groups"),
        (changed(LLM_COMPRESSOR_W4, transform_config={"config_groups": {"u": {}}}), "transform"),
        (changed(LLM_COMPRESSOR_W4, sparsity_config={"format": "sparse-24"}), "sparse"),
        (changed(AUTO_ROUND_W4, bits=3), "bits=3"),
        (changed(AUTO_ROUND_W4, desc_act=True), "desc_act=true"),
        (changed(AUTO_ROUND_W4, checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
        ({**AUTO_AWQ, "bits": 8}, "bits=8"),
        ({**AUTO_AWQ, "version": "gemv"}, "version 'gemv'"),
    ],
)
def test_configs_that_cannot_be_read_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        formats.of(config)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_zero_points_of_both_versions_are_read(version: str, bits: int) -> None:
    """Asymmetric: not written here, nor run by vLLM, but simulated."""
    codes = some_codes(QuantizationArgs(bits, 32, symmetric=False))
    assert codes.zeros_OG is not None
    codes.zeros_OG[0] = 0  # which version 1 stores as all ones
    less = 1 if version == "gptq" else 0
    stored_OG = (codes.zeros_OG.int() - less) % 2**bits
    tensors = {
        "l.qweight": pack_naively(codes.codes_OI.tolist(), bits).T,
        "l.scales": codes.scales_OG.T,
        "l.qzeros": pack_naively(stored_OG.T.tolist(), bits),
    }
    config = changed(AUTO_ROUND_W4, bits=bits, sym=False, checkpoint_format=version)
    assert formats.of(config).read("l", tensors.__getitem__).dequantize().equal(codes.dequantize())


def pack_naively(rows: list[list[int]], bits: int) -> Tensor:
    per_word = 32 // bits
    words = [
        [
            sum(code << (bits * place) for place, code in enumerate(row[start : start + per_word]))
            for start in range(0, len(row), per_word)
        ]
        for row in rows
    ]
    # The same bits as int32.
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def test_padding_of_other_tools_is_cut_off() -> None:
    """compressed-tensors fills up the last word where sizes are odd."""
    codes = some_codes(QuantizationArgs(4, None, symmetric=False), outputs=5, inputs=12)
    assert codes.zeros_OG is not None
    tensors = {
        "l.weight_packed": pack_to_int32((codes.codes_OI.int() - 8).to(torch.int8), 4),
        "l.weight_zero_point": pack_to_int32(
            (codes.zeros_OG.int() - 8).to(torch.int8), 4, packed_dim=0
        ),
        "l.weight_scale": codes.scales_OG,
        "l.weight_shape": torch.tensor([5, 12]),
    }
    config = changed(LLM_COMPRESSOR_W4, weights__strategy="channel", weights__group_size=None)
    assert formats.of(config).read("l", tensors.__getitem__).dequantize().equal(codes.dequantize())
