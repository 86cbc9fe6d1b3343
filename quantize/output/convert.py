"""From a checkpoint's tensors to those that go to disk, step by step: first what is outside the
blocks, then block after block.

Called by `run`, which keeps what a step made and may go on behind the steps of an earlier run.
"""

# Shapes: O = outputs, I = inputs, G = groups along I.

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from packhorse.quantize import methods
from packhorse.quantize.calibration.block_loader import Block, outside, walk
from packhorse.quantize.calibration.runner import LiveBlock, Runner
from packhorse.quantize.calibration.statistics import Inputs
from packhorse.quantize.errors import BadInput
from packhorse.quantize.formats import Format
from packhorse.quantize.methods import Method, Rounded, int8, smoothing
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import Family, Group
from packhorse.quantize.numerics.grid import FP8_MAX, Codes
from packhorse.quantize.plan.estimates import block_of
from packhorse.quantize.plan.plan import Plan
from packhorse.quantize.report.report import Layer
from torch import Tensor

Tensors = dict[str, Tensor]
STATISTICS_BYTES = 2 * 1024**3
"""Of experts that are looked at in one run of the block: more runs of it, or more memory."""
KV_SCALES = ("self_attn.k_scale", "self_attn.v_scale")


def _stateless() -> Iterator[Tensors]:
    return iter(())


@dataclass
class Step:
    """`parts` are made while they are taken; only then is known what is said of them, and the state
    that the next step begins with.
    """

    parts: Iterable[Tensors]
    state: Callable[[], Iterator[Tensors]] = _stateless
    layers: list[Layer] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    """Layers for which a search of scales found nothing better than leaving them."""
    experts: dict[str, list[int]] = field(default_factory=dict)
    """Tokens of the calibration text that were sent to each expert, by block."""
    started_s: float = field(default_factory=time.monotonic)

    def said(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "unscaled": self.unscaled,
            "experts": self.experts,
            "seconds": time.monotonic() - self.started_s,
        }


@dataclass(frozen=True)
class Converter:
    """One plan at work. `advance` is told of each quantized layer."""

    source: Checkpoint
    planned: Plan
    method: Method
    layout: Format
    advance: Callable[[int], None]

    def by_weights(self, done: int) -> Iterator[Step]:
        """For methods that look at nothing but the weights; without the first `done` steps."""
        blocks: dict[str, list[str]] = {"": []}
        for name in self.source.names():
            blocks.setdefault(block_of(name), []).append(name)
        for block, names in list(blocks.items())[done:]:
            step = Step(())
            parts = (self._by_weight(name, step) for name in names)
            step.parts = parts if not block else _joined(parts)
            yield step
            self.source.let_go()

    def _by_weight(self, name: str, step: Step) -> Tensors:
        tensor = finite(name, self.source.get(name))
        prefix = name.removesuffix(".weight")
        if prefix == name or prefix not in set(self.planned.linears):
            return {name: self._stored(tensor)}
        rounded = self.method.quantize(tensor, None, self._scale_dtype(prefix, tensor.dtype))
        step.layers.append(Layer.of(prefix, tensor, rounded))
        self.advance(1)
        return self.layout.tensors(prefix, rounded.codes)

    def by_blocks(self, runner: Runner, family: Family, done: int) -> Iterator[Step]:
        """Each block quantized for what it is given by the quantized blocks before it; without the
        first `done` steps, behind which the runner must be.
        """
        if not done:
            names = outside(self.source, family)
            yield Step({name: self._stored(finite(name, self.source.get(name)))} for name in names)
        for block in walk(self.source, family, start=max(0, done - 1)):
            step = Step((), runner.state)
            step.parts = self._of_block(block, runner, family, step)
            yield step

    def rehearse(self, runner: Runner, family: Family, index: int) -> None:
        """Quantize one block on the model's first hidden states, for the memory that it takes; the
        runner is of no use after that.
        """
        for block in walk(self.source, family, start=index):
            for _ in self._of_block(block, runner, family, Step(())):
                return

    def _of_block(
        self, block: Block, runner: Runner, family: Family, step: Step
    ) -> Iterator[Tensors]:
        for name in block.tensors:
            finite(name, block.tensors[name])
        live = runner.enter(block)
        block.tensors.clear()
        self.source.let_go()
        made = self._quantize(live, family, step)
        runner.leave(live)
        yield made

    def _quantize(self, live: LiveBlock, family: Family, step: Step) -> Tensors:
        """Quantize the live block in place; returns its tensors as they go to disk."""
        method, linears = self.method, set(self.planned.linears)
        stages = family.stages(live.names)
        if method.calibrated:
            alike = [g for stage in stages for g in stage if not family.is_expert(g[0])]
            quantized = {
                layer
                for group in alike
                for layer in group
                if live.prefix + family.on_disk(layer) in linears
            }
            left = method.prepare(live.module, family, lambda: live.inputs(alike), quantized)
            left += self._smooth_others(live, family, alike, quantized)
            step.unscaled += [live.prefix + family.on_disk(layer) for layer in left]
            live.keep_original([g for g in alike if live.prefix + family.on_disk(g[0]) in linears])
            if live.expert_tokens:
                step.experts[live.prefix.removesuffix(".")] = live.expert_tokens
        written: Tensors = {}
        for name, dtype in live.dtypes.items():
            if name.removesuffix(".weight") not in linears:
                # Scales that were moved into it are rounded here, before others make up for it.
                place = live.tensor(family.in_module(name.removeprefix(live.prefix)))
                written[name] = self._stored(place.to(dtype)).cpu()
                place.copy_(written[name])
        for groups in (part for stage in stages for part in _in_parts(stage, live)):
            wanted = [g for g in groups if live.prefix + family.on_disk(g[0]) in linears]
            seen = live.inputs(wanted) if wanted and method.calibrated else {}
            for group in wanted:
                written |= self._of_group(group, seen.pop(group[0], None), live, family, step)
        if self.planned.kv:
            seen_range = live.key_value_range()
            for name, largest in zip(KV_SCALES, seen_range, strict=True):
                written[live.prefix + name] = torch.tensor([kv_scale(largest)])
        return written

    def _of_group(
        self, group: Group, inputs: Inputs | None, live: LiveBlock, family: Family, step: Step
    ) -> Tensors:
        written: Tensors = {}
        for layer in group:
            prefix, weight_OI = live.prefix + family.on_disk(layer), live.weight(layer)
            scale_dtype = self._scale_dtype(prefix, live.dtypes[f"{prefix}.weight"])
            rounded = self._method_of(prefix).quantize(weight_OI, inputs, scale_dtype)
            step.layers.append(Layer.of(prefix, weight_OI, rounded, inputs))
            written |= self.layout.tensors(prefix, _on_cpu(rounded).codes)
            weight_OI.copy_(rounded.codes.dequantize())
            self.advance(1)
        return written

    def _smooth_others(
        self,
        live: LiveBlock,
        family: Family,
        groups: list[Group],
        quantized: Collection[str],
    ) -> list[str]:
        """What `prepare` does, for layers that alone have their inputs rounded."""
        schemes = {
            layer: scheme
            for group in groups
            for layer in group
            if (scheme := self.planned.others.get(live.prefix + family.on_disk(layer)))
            and scheme.activation_bits == 8
        }
        if not schemes:
            return []
        grid = next(iter(schemes.values())).grid
        return smoothing.search(
            live.module,
            family,
            live.inputs([group for group in groups if group[0] in schemes]),
            lambda weights, seen: int8.search_scales(weights, seen, grid),
            quantized,
            only=schemes,
        )

    def _stored(self, tensor: Tensor) -> Tensor:
        wanted = self.planned.convert_to
        return tensor.to(getattr(torch, wanted)) if wanted else tensor

    def _method_of(self, prefix: str) -> Method:
        scheme = self.planned.scheme_of(prefix)
        if scheme == self.method.scheme:
            return self.method
        return methods.make("int8" if scheme.activation_bits == 8 else self.planned.method, scheme)

    def _scale_dtype(self, prefix: str, dtype: torch.dtype) -> torch.dtype:
        """float32 for W8A8, as its kernels read them; else the model's dtype."""
        if self.planned.scheme_of(prefix).activation_bits == 8:
            return torch.float32
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _in_parts(stage: list[Group], live: LiveBlock) -> Iterator[list[Group]]:
    """A stage's groups, not more at a time than their statistics may take: one matrix, of the size
    of its inputs, for each.
    """
    part: list[Group] = []
    taken = 0
    for group in stage:
        size = 4 * live.weight(group[0]).shape[1] ** 2
        if part and taken + size > STATISTICS_BYTES:
            yield part
            part, taken = [], 0
        part.append(group)
        taken += size
    yield part


def finite(name: str, tensor: Tensor) -> Tensor:
    """Raises BadInput where it is not."""
    if not torch.isfinite(tensor).all():
        raise BadInput(f"Tensor {name} holds NaN or infinity; the checkpoint is broken.")
    return tensor


def kv_scale(largest: float) -> float:
    """The smallest power of two that brings values up to `largest` into float8's range. A power of
    two, because dividing by it rounds nothing: other scales cost more than they gain (lab log).
    """
    return 2.0 ** math.ceil(math.log2(max(largest, 1e-6) / FP8_MAX))


def _joined(parts: Iterable[Tensors]) -> Iterator[Tensors]:
    """As one part."""
    joined: Tensors = {}
    for tensors in parts:
        joined |= tensors
    yield joined


def _on_cpu(rounded: Rounded) -> Rounded:
    codes = rounded.codes
    zeros_OG = None if codes.zeros_OG is None else codes.zeros_OG.cpu()
    return Rounded(
        Codes(codes.codes_OI.cpu(), codes.scales_OG.cpu(), codes.grid, zeros_OG), rounded.note
    )
