"""compressed-tensors with several schemes: each scheme is a config group with its own layout.

A layer belongs to the group that names it, or else to the group with the target `Linear`. Each of
the layers that vLLM fuses is named, as vLLM looks them up one by one. Source: `find_matched_target`
in vLLM 0.32's compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from packhorse.quantize.formats.compressed_tensors import CompressedTensors, make
from packhorse.quantize.numerics.grid import QuantizedWeight, Scheme

CLASS = "Linear"
FORMAT = "mixed-precision"
PATTERN = "re:"


@dataclass(frozen=True)
class Mixed:
    groups: tuple[tuple[tuple[str, ...], CompressedTensors], ...]
    """(targets, layout); the first group has the scheme of most layers."""
    name: str = "compressed-tensors"

    @property
    def scheme(self) -> Scheme:
        return self.groups[0][1].scheme

    def layout_of(self, prefix: str) -> CompressedTensors:
        for targets, layout in self.groups:
            if any(_names(target, prefix) for target in targets):
                return layout
        return next(
            (layout for targets, layout in self.groups if CLASS in targets), self.groups[0][1]
        )

    def scheme_of(self, prefix: str) -> Scheme:
        return self.layout_of(prefix).scheme

    def tensors(self, prefix: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        return self.layout_of(prefix).tensors(prefix, weight)

    def config(self, *, ignore: Sequence[str], kv_scales: bool) -> dict[str, Any]:
        config = self.groups[0][1].config(ignore=ignore, kv_scales=kv_scales)
        groups = {}
        for number, (targets, layout) in enumerate(self.groups):
            (group,) = layout.config(ignore=(), kv_scales=False)["config_groups"].values()
            groups[f"group_{number}"] = {**group, "targets": list(targets), "format": layout.layout}
        return {**config, "format": FORMAT, "config_groups": groups}

    def linears(self, names: Sequence[str]) -> list[str]:
        mark = ".weight_scale"  # in every layout
        return [name.removesuffix(mark) for name in names if name.endswith(mark)]

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> QuantizedWeight:
        return self.layout_of(prefix).read(prefix, get)


def _names(target: str, prefix: str) -> bool:
    if target.startswith(PATTERN):
        return re.match(target.removeprefix(PATTERN), prefix) is not None
    return target == prefix


def make_mixed(scheme: Scheme, others: Mapping[str, Scheme]) -> Mixed:
    """`others` are the layers with another scheme than most."""
    groups: list[tuple[tuple[str, ...], CompressedTensors]] = [((CLASS,), make(scheme))]
    for other in dict.fromkeys(others.values()):
        names = tuple(prefix for prefix, scheme in others.items() if scheme == other)
        groups.append((names, make(other)))
    return Mixed(tuple(groups))
