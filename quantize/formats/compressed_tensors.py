"""compressed-tensors: one config, three layouts of a linear layer.

pack-quantized   weight_packed int32 (O, I*bits/32), codes from 0 up, packed along I; weight_scale
                 (O, G); weight_shape int64 (2); weight_zero_point int32 (O*bits/32, G), packed
                 along O, for an asymmetric grid. Activations left alone.
int-quantized    weight int8 (O, I), weight_scale (O, 1). int8 activations.
float-quantized  weight float8_e4m3fn (O, I), weight_scale (O, 1). fp8 activations.

Activations are rounded while serving, with a scale a token. Source: the config classes and packing
helpers of compressed-tensors 0.17, which vLLM installs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from packhorse.quantize.errors import Unsupported
from packhorse.quantize.numerics.grid import Codes, Grid, Scheme, pack, unpack
from torch import Tensor

PACKED = "pack-quantized"
# Layout -> the tensor that shows that a layer is quantized.
_MARKS = {
    PACKED: ".weight_packed",
    "int-quantized": ".weight_scale",
    "float-quantized": ".weight_scale",
    "naive-quantized": ".weight_scale",  # either of the two above, as other tools call it
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

    def tensors(self, prefix: str, codes: Codes) -> dict[str, Tensor]:
        found = {f"{prefix}.weight_scale": codes.scales_OG}
        if self.layout != PACKED:
            return {f"{prefix}.weight": codes.codes_OI, **found}
        bits = codes.grid.bits
        found[f"{prefix}.weight_packed"] = pack(codes.codes_OI.int() - codes.grid.low, bits)
        found[f"{prefix}.weight_shape"] = torch.tensor(codes.codes_OI.shape)
        if codes.zeros_OG is not None:
            found[f"{prefix}.weight_zero_point"] = pack(codes.zeros_OG.T, bits).T
        return found

    def config(self, *, ignore: Sequence[str], kv_scales: bool) -> dict[str, Any]:
        grid = self.scheme.grid
        kind = "float" if grid.floating else "int"
        weights = {
            "num_bits": grid.bits,
            "type": kind,
            "symmetric": grid.symmetric,
            "strategy": "group" if grid.group_size else "channel",
            "group_size": grid.group_size,
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

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> Codes:
        grid = self.scheme.grid
        scales_OG = get(f"{prefix}.weight_scale")
        if self.layout != PACKED:
            codes_OI = get(f"{prefix}.weight")
            return Codes(codes_OI, scales_OG.reshape(codes_OI.shape[0], -1), grid)
        # Other tools fill up the last word; the shape says what counts.
        outputs, inputs = get(f"{prefix}.weight_shape").tolist()
        codes_OI = unpack(get(f"{prefix}.weight_packed"), grid.bits)[:, :inputs].int() + grid.low
        zeros_OG = None
        if not grid.symmetric:
            words_GP = get(f"{prefix}.weight_zero_point").T.contiguous()
            zeros_OG = unpack(words_GP, grid.bits)[:, :outputs].T.to(grid.code_dtype)
        return Codes(codes_OI.to(grid.code_dtype), scales_OG, grid, zeros_OG)


def make(scheme: Scheme) -> CompressedTensors:
    grid = scheme.grid
    whole_rows = grid.symmetric and grid.bits == 8 and grid.group_size is None
    if not grid.floating and grid.bits in (4, 8) and scheme.activation_bits == 16:
        return CompressedTensors(scheme, PACKED)
    if whole_rows and scheme.activation_bits == 8:
        layout = "float-quantized" if grid.floating else "int-quantized"
        return CompressedTensors(scheme, layout)
    raise Unsupported(
        f"compressed-tensors cannot hold {scheme} like this: it is for integers of 4 or 8 bits "
        "with activations left alone, or for 8 bits on both sides, symmetric, one scale a channel."
    )


def of(config: dict[str, Any]) -> list[tuple[tuple[str, ...], CompressedTensors]]:
    """The kinds of layers of a `quantization_config`, with their targets. Raises Unsupported."""
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
    grid = Grid(
        weights.get("num_bits", 8),
        weights.get("group_size") if weights.get("strategy") == "group" else None,
        weights.get("symmetric", True),
        weights.get("type", "int") == "float",
    )
    packed = layout == PACKED
    if (
        weights.get("strategy") not in ("group", "channel")
        or grid.bits not in (4, 8)
        or (grid.floating and (packed or grid.bits != 8))
        or not (packed or grid.symmetric)
    ):
        raise Unsupported(f"compressed-tensors weights of this kind cannot be read: {weights}.")
    if group.get("output_activations") or (activations and not _by_token(activations, grid)):
        raise Unsupported(
            f"compressed-tensors with these activations cannot be read: {activations}; 8 bits, "
            "symmetric, dynamic, one scale a token can."
        )
    return CompressedTensors(Scheme(grid, 8 if activations else 16), layout)


def _by_token(activations: dict[str, Any], grid: Grid) -> bool:
    return (
        activations.get("num_bits") == 8
        and activations.get("strategy") == "token"
        and bool(activations.get("dynamic"))
        and activations.get("symmetric", True)
        and (activations.get("type", "int") == "float") == grid.floating
    )
