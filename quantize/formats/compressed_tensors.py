"""compressed-tensors, `int-quantized`: int8 weights (O, I) with a float32 scale per output, dynamic
int8 activations.

vLLM reads this as W8A8 on CPU and CUDA. Source: the config classes of compressed-tensors 0.17,
which vLLM installs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quantize.grid import Codes, Grid


def tensors(prefix: str, codes: Codes) -> dict[str, Tensor]:
    return {f"{prefix}.weight": codes.codes_OI, f"{prefix}.weight_scale": codes.scales_OG}


def config(grid: Grid) -> dict[str, Any]:
    number = {"num_bits": grid.bits, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": "channel", "group_size": None, "dynamic": False},
                "input_activations": {**number, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    }


def read(prefix: str, get: Callable[[str], Tensor], config: dict[str, Any]) -> Codes:
    bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    return Codes(get(f"{prefix}.weight"), get(f"{prefix}.weight_scale"), Grid(bits))


def linears(names: list[str]) -> list[str]:
    return [name.removesuffix(".weight_scale") for name in names if name.endswith(".weight_scale")]
