"""The GPTQ format: codes packed along the inputs, with a scale and a zero point per group.

qweight int32 (I*bits/32, O) | scales (G, O) | qzeros int32 (G, O*bits/32) | g_idx int32 (I), the
group of each input, which vLLM ignores and older readers need.

Version 1 stores zero points minus one, version 2 stores them unchanged. This module writes version
1, which every reader knows, and symmetric weights only, as vLLM requires: all zero points are the
middle code (qzeros 0x77777777 at 4 bits). It reads both versions, symmetric and asymmetric.

Source: vLLM 0.32, model_executor/layers/quantization/auto_gptq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from packhorse.quantize.errors import Unsupported
from packhorse.quantize.numerics.grid import QuantizationArgs, QuantizedWeight, Scheme, pack, unpack

# checkpoint_format -> the number that is subtracted from a zero point when it is stored.
SUBTRACTED = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class Gptq:
    scheme: Scheme
    version: str = "gptq"
    """A key of SUBTRACTED. It matters for reading; version 1 is written."""
    name: str = field(default="gptq", init=False)

    def scheme_of(self, prefix: str) -> Scheme:
        return self.scheme

    def tensors(self, prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        bits, low = weight.args.bits, weight.args.low
        outputs, inputs = weight.codes_OI.shape
        groups = weight.scales_OG.shape[1]
        return {
            f"{prefix}.qweight": pack(weight.codes_OI.int() - low, bits).T,
            f"{prefix}.scales": weight.scales_OG.T,
            f"{prefix}.qzeros": pack(torch.full((groups, outputs), -low - 1), bits),
            f"{prefix}.g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
        }

    def config(self, *, ignore: Sequence[str], kv_scales: bool) -> dict[str, Any]:
        """`ignore` is not written: vLLM knows the quantized layers by their tensors."""
        if kv_scales:
            raise Unsupported("gptq has no place for KV scales; use --format compressed-tensors.")
        return {
            "quant_method": self.name,
            "checkpoint_format": "gptq",
            "bits": self.scheme.weights.bits,
            "group_size": self.scheme.weights.group_size or -1,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
        }

    def linears(self, names: Sequence[str]) -> list[str]:
        return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> QuantizedWeight:
        """Zero points of symmetric weights are not read, as in vLLM: some tools write those of the
        other version.
        """
        args = self.scheme.weights
        codes_OI = unpack(get(f"{prefix}.qweight").T.contiguous(), args.bits).int() + args.low
        zeros_OG = None
        if not args.symmetric:
            stored_GO = unpack(get(f"{prefix}.qzeros"), args.bits).int()
            # A zero point of 0, minus one, is stored as the largest code.
            zeros_GO = (stored_GO + SUBTRACTED[self.version]) % (1 << args.bits)
            zeros_OG = zeros_GO.T.to(args.code_dtype)
        return QuantizedWeight(
            codes_OI.to(args.code_dtype), get(f"{prefix}.scales").T, args, zeros_OG
        )


def make(scheme: Scheme) -> Gptq:
    args = scheme.weights
    if (
        args.floating
        or not args.symmetric
        or args.bits not in (4, 8)
        or scheme.activation_bits != 16
    ):
        raise Unsupported(
            f"gptq cannot hold {scheme}{'' if args.symmetric else ', asymmetric'}: it is for 4 or "
            "8 bits, symmetric, activations left alone; use --format compressed-tensors."
        )
    return Gptq(scheme)


def of(config: dict[str, Any]) -> Gptq:
    bits, group_size = config.get("bits"), config.get("group_size", -1)
    version = config.get("checkpoint_format") or "gptq"
    if bits not in (4, 8):
        raise Unsupported(f"gptq with bits={bits} cannot be read; 4 and 8 can.")
    if version not in SUBTRACTED:
        raise Unsupported(
            f"gptq with checkpoint_format {version!r} cannot be read; "
            f"{' and '.join(SUBTRACTED)} can."
        )
    if config.get("desc_act") and group_size != -1:
        raise Unsupported(
            "gptq with desc_act=true cannot be read, by vLLM neither; quantize again with "
            "desc_act=false."
        )
    args = QuantizationArgs(bits, None if group_size == -1 else group_size, config.get("sym", True))
    return Gptq(Scheme(args), version)
