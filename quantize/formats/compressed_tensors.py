"""compressed-tensors: one config, and three layouts of a linear layer.

pack-quantized   weight_packed int32 (O, I*bits/32), codes from 0 up, packed along I; weight_scale
                 (O, G); weight_shape int64 (2); with zero points also weight_zero_point int32
                 (O*bits/32, G), packed along O. Activations are not quantized.
int-quantized    weight int8 (O, I), weight_scale (O, 1). int8 activations.
float-quantized  weight float8_e4m3fn (O, I), weight_scale (O, 1). fp8 activations.

The engine quantizes activations, with one scale per token. Source: the config classes and packing
helpers of compressed-tensors 0.17, which vLLM installs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from packhorse.quantize.errors import Unsupported
from packhorse.quantize.numerics.grid import QuantizationArgs, QuantizedWeight, Scheme, pack, unpack

PACKED = "pack-quantized"
# Layout -> the tensor that marks a quantized layer.
_MARKS = {
    PACKED: ".weight_packed",
    "int-quantized": ".weight_scale",
    "float-quantized": ".weight_scale",
    "naive-quantized": ".weight_scale",  # another tool's name for either of the two above
}
KV_CACHE = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor",
    "dynamic": False,
}


@dataclass(frozen=True)
class CompressedTensors:
    scheme: Scheme
    layout: str
    """A key of _MARKS."""
    name: str = field(default="compressed-tensors", init=False)

    def scheme_of(self, prefix: str) -> Scheme:
        return self.scheme

    def tensors(self, prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        found = {f"{prefix}.weight_scale": weight.scales_OG}
        if self.layout != PACKED:
            return {f"{prefix}.weight": weight.codes_OI, **found}
        bits = weight.args.bits
        found[f"{prefix}.weight_packed"] = pack(weight.codes_OI.int() - weight.args.low, bits)
        found[f"{prefix}.weight_shape"] = torch.tensor(weight.codes_OI.shape)
        if weight.zeros_OG is not None:
            found[f"{prefix}.weight_zero_point"] = pack(weight.zeros_OG.T, bits).T
        return found

    def config(self, *, ignore: Sequence[str], kv_scales: bool) -> dict[str, Any]:
        args = self.scheme.weights
        kind = "float" if args.floating else "int"
        weights = {
            "num_bits": args.bits,
            "type": kind,
            "symmetric": args.symmetric,
            "strategy": "group" if args.group_size else "channel",
            "group_size": args.group_size,
            "dynamic": False,
        }
        activations = {
            "num_bits": 8,
            "type": kind,
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
        return {
            "quant_method": self.name,
            "format": self.layout,
            "quantization_status": "compressed",
            "ignore": list(ignore),
            "kv_cache_scheme": dict(KV_CACHE) if kv_scales else None,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": activations if self.scheme.activation_bits == 8 else None,
                    "output_activations": None,
                }
            },
        }

    def linears(self, names: Sequence[str]) -> list[str]:
        mark = _MARKS[self.layout]
        return [name.removesuffix(mark) for name in names if name.endswith(mark)]

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> QuantizedWeight:
        args = self.scheme.weights
        scales_OG = get(f"{prefix}.weight_scale")
        if self.layout != PACKED:
            codes_OI = get(f"{prefix}.weight")
            return QuantizedWeight(codes_OI, scales_OG.reshape(codes_OI.shape[0], -1), args)
        # Other tools pad the last word; the shape tells where the codes end.
        outputs, inputs = get(f"{prefix}.weight_shape").tolist()
        codes_OI = unpack(get(f"{prefix}.weight_packed"), args.bits)[:, :inputs].int() + args.low
        zeros_OG = None
        if not args.symmetric:
            words_GP = get(f"{prefix}.weight_zero_point").T.contiguous()
            zeros_OG = unpack(words_GP, args.bits)[:, :outputs].T.to(args.code_dtype)
        return QuantizedWeight(codes_OI.to(args.code_dtype), scales_OG, args, zeros_OG)


def make(scheme: Scheme) -> CompressedTensors:
    args = scheme.weights
    whole_rows = args.symmetric and args.bits == 8 and args.group_size is None
    if not args.floating and args.bits in (4, 8) and scheme.activation_bits == 16:
        return CompressedTensors(scheme, PACKED)
    if whole_rows and scheme.activation_bits == 8:
        layout = "float-quantized" if args.floating else "int-quantized"
        return CompressedTensors(scheme, layout)
    raise Unsupported(
        f"compressed-tensors cannot hold {scheme} like this: it is for integers of 4 or 8 bits "
        "with activations left alone, or for 8 bits on both sides, symmetric, one scale a channel."
    )


def of(config: dict[str, Any]) -> list[tuple[tuple[str, ...], CompressedTensors]]:
    """The layouts in a `quantization_config`, each with its targets. Raises Unsupported."""
    found = [
        (tuple(group.get("targets") or ()), _of_group(group, config))
        for group in (config.get("config_groups") or {}).values()
    ]
    if not found:
        raise Unsupported("compressed-tensors without config_groups cannot be read.")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise Unsupported("compressed-tensors with a transform_config cannot be read.")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise Unsupported("compressed-tensors with sparse weights cannot be read.")
    return found


def _of_group(group: dict[str, Any], config: dict[str, Any]) -> CompressedTensors:
    layout = group.get("format") or config.get("format")
    weights, activations = group.get("weights"), group.get("input_activations")
    if layout not in _MARKS or not isinstance(weights, dict):
        raise Unsupported(
            f"compressed-tensors of format {layout!r} cannot be read; {', '.join(_MARKS)} can."
        )
    if weights.get("actorder") in ("group", "dynamic"):
        raise Unsupported(
            f"compressed-tensors with actorder {weights['actorder']!r} cannot be read, by vLLM "
            "neither; quantize again with actorder static."
        )
    args = QuantizationArgs(
        weights.get("num_bits", 8),
        weights.get("group_size") if weights.get("strategy") == "group" else None,
        weights.get("symmetric", True),
        weights.get("type", "int") == "float",
    )
    packed = layout == PACKED
    if (
        weights.get("strategy") not in ("group", "channel")
        or args.bits not in (4, 8)
        or (args.floating and (packed or args.bits != 8))
        or not (packed or args.symmetric)
    ):
        raise Unsupported(f"compressed-tensors weights of this kind cannot be read: {weights}.")
    if group.get("output_activations") or (activations and not _by_token(activations, args)):
        raise Unsupported(
            f"compressed-tensors with these activations cannot be read: {activations}; 8 bits, "
            "symmetric, dynamic, one scale a token can."
        )
    return CompressedTensors(Scheme(args, 8 if activations else 16), layout)


def _by_token(activations: dict[str, Any], args: QuantizationArgs) -> bool:
    return (
        activations.get("num_bits") == 8
        and activations.get("strategy") == "token"
        and bool(activations.get("dynamic"))
        and activations.get("symmetric", True)
        and (activations.get("type", "int") == "float") == args.floating
    )
