"""compressed-tensors with layers of several kinds: each kind a config group with a format of its
own, and each layer as its kind's layout has it.

A layer belongs to the group that names it, or else to the one that targets `Linear`. Layers that
vLLM fuses are named alike, one by one, as it looks them up. Source: `find_matched_target` of
vLLM 0.32's compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packhorse.quantize.formats.compressed_tensors import CompressedTensors, make
from packhorse.quantize.numerics.grid import Codes, Scheme
from torch import Tensor

CLASS = "Linear"
FORMAT = "mixed-precision"
PATTERN = "re:"


@dataclass(frozen=True)
class Mixed:
    groups: tuple[tuple[tuple[str, ...], CompressedTensors], ...]
    """Targets and kind; the first group is the usual one."""
    name: str = "compressed-tensors"

    @property
    def scheme(self) -> Scheme:
        return self.groups[0][1].scheme

    def kind_of(self, prefix: str) -> CompressedTensors:
        for targets, kind in self.groups:
            if any(_names(target, prefix) for target in targets):
                return kind
        return next((kind for targets, kind in self.groups if CLASS in targets), self.groups[0][1])

    def scheme_of(self, prefix: str) -> Scheme:
        return self.kind_of(prefix).scheme

    def tensors(self, prefix: str, codes: Codes) -> dict[str, Tensor]:
        return self.kind_of(prefix).tensors(prefix, codes)

    def config(self, *, ignore: Sequence[str], kv_scales: bool) -> dict[str, Any]:
        config = self.groups[0][1].config(ignore=ignore, kv_scales=kv_scales)
        groups = {}
        for number, (targets, kind) in enumerate(self.groups):
            (group,) = kind.config(ignore=(), kv_scales=False)["config_groups"].values()
            groups[f"group_{number}"] = {**group, "targets": list(targets), "format": kind.layout}
        return {**config, "format": FORMAT, "config_groups": groups}

    def linears(self, names: Sequence[str]) -> list[str]:
        mark = ".weight_scale"  # whatever the kind
        return [name.removesuffix(mark) for name in names if name.endswith(mark)]

    def read(self, prefix: str, get: Callable[[str], Tensor]) -> Codes:
        return self.kind_of(prefix).read(prefix, get)


def _names(target: str, prefix: str) -> bool:
    if target.startswith(PATTERN):
        return re.match(target.removeprefix(PATTERN), prefix) is not None
    return target == prefix


def make_mixed(scheme: Scheme, others: Mapping[str, Scheme]) -> Mixed:
    """`others` are the layers that are not of the usual scheme."""
    groups: list[tuple[tuple[str, ...], CompressedTensors]] = [((CLASS,), make(scheme))]
    for other in dict.fromkeys(others.values()):
        names = tuple(prefix for prefix, scheme in others.items() if scheme == other)
        groups.append((names, make(other)))
    return Mixed(tuple(groups))
