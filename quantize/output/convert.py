"""Convert a checkpoint's tensors to those of the quantized checkpoint, in steps: first the tensors
outside the blocks, then block after block.

Called by run.py, which writes each step to disk, and can continue after the steps of an earlier
run.
"""

# Shapes: O = outputs, I = inputs, G = groups along I.

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from packhorse.quantize import methods
from packhorse.quantize.calibration.block_loader import Block, load_blocks, names_outside_blocks
from packhorse.quantize.calibration.runner import Runner, RunningBlock
from packhorse.quantize.calibration.statistics import InputStatistics
from packhorse.quantize.errors import BadInput
from packhorse.quantize.formats import Format
from packhorse.quantize.methods import Method, QuantizationResult, int8, smoothing
from packhorse.quantize.model.checkpoint import Checkpoint
from packhorse.quantize.model.families import Family, Group
from packhorse.quantize.numerics.grid import FP8_MAX, QuantizedWeight, relative_error
from packhorse.quantize.plan.estimates import block_of
from packhorse.quantize.plan.plan import Plan

Tensors = dict[str, Tensor]
STATISTICS_BYTES = 2 * 1024**3
"""Limit on the Hessians of experts that are collected in one pass through the block. A lower limit
takes more passes."""
KV_SCALES = ("self_attn.k_scale", "self_attn.v_scale")


@dataclass(frozen=True)
class LayerResult:
    """What the report says of one quantized linear layer.

    relative_error is the squared error of its weight, and output_error that of its output on the
    calibration rows, both over the squared size. Both include the change by error compensation,
    which lowers the error of the model and not that of the layer.
    """

    name: str
    bits: int
    relative_error: float
    output_error: float | None = None
    """None without calibration."""
    note: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        weight_OI: Tensor,
        result: QuantizationResult,
        statistics: InputStatistics | None = None,
    ) -> LayerResult:
        output = None
        if statistics is not None:
            weight_OI = weight_OI.float()
            error_OI = result.weight.dequantize() - weight_OI
            lost = ((error_OI @ statistics.hessian_II) * error_OI).sum()
            whole = ((weight_OI @ statistics.hessian_II) * weight_OI).sum()
            output = (lost / whole.clamp_min(1e-30)).item()
        relative = relative_error(weight_OI, result.weight)
        return cls(name, result.weight.args.bits, relative, output, result.note)

    def as_json(self) -> dict[str, Any]:
        figures = {"relative_error": self.relative_error, "output_error": self.output_error}
        rounded = {k: float(f"{v:.3e}") for k, v in figures.items() if v is not None}
        noted = {"note": self.note} if self.note else {}
        return {"name": self.name, "bits": self.bits, **rounded, **noted}


def _no_state() -> Iterator[Tensors]:
    return iter(())


@dataclass
class Step:
    """One step of the conversion. Iterating over `parts` makes them; the summary and the state are
    complete after that.
    """

    parts: Iterable[Tensors]
    state: Callable[[], Iterator[Tensors]] = _no_state
    """The state that the next step starts from."""
    layers: list[LayerResult] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    """Layers for which the search for smoothing factors found none better than ones."""
    experts: dict[str, list[int]] = field(default_factory=dict)
    """Calibration tokens that were routed to each expert, by block."""
    started_s: float = field(default_factory=time.monotonic)

    def summary(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "unscaled": self.unscaled,
            "experts": self.experts,
            "seconds": time.monotonic() - self.started_s,
        }


@dataclass(frozen=True)
class Converter:
    """Carries out a plan. `advance` is called with the number of layers just quantized."""

    source: Checkpoint
    planned: Plan
    method: Method
    layout: Format
    advance: Callable[[int], None]

    def by_weights(self, done: int) -> Iterator[Step]:
        """The steps of a method without calibration, but the first `done`."""
        blocks: dict[str, list[str]] = {"": []}
        for name in self.source.names():
            blocks.setdefault(block_of(name), []).append(name)
        for block, names in list(blocks.items())[done:]:
            step = Step(())
            parts = (self._by_weight(name, step) for name in names)
            step.parts = parts if not block else _merged(parts)
            yield step
            self.source.close_files()

    def _by_weight(self, name: str, step: Step) -> Tensors:
        tensor = finite(name, self.source.get(name))
        prefix = name.removesuffix(".weight")
        if prefix == name or prefix not in set(self.planned.linears):
            return {name: self._converted(tensor)}
        result = self.method.quantize(tensor, None, self._scale_dtype(prefix, tensor.dtype))
        step.layers.append(LayerResult.of(prefix, tensor, result))
        self.advance(1)
        return self.layout.tensors(prefix, result.weight)

    def by_blocks(self, runner: Runner, family: Family, done: int) -> Iterator[Step]:
        """The steps with calibration, but the first `done`. Each block is quantized for the hidden
        states behind the quantized blocks before it; the runner must have those behind step `done`.
        """
        if not done:
            names = names_outside_blocks(self.source, family)
            yield Step(
                {name: self._converted(finite(name, self.source.get(name)))} for name in names
            )
        for block in load_blocks(self.source, family, start=max(0, done - 1)):
            step = Step((), runner.state)
            step.parts = self._of_block(block, runner, family, step)
            yield step

    def dry_run(self, runner: Runner, family: Family, index: int) -> None:
        """Quantize one block on the model's first hidden states and drop the result, to find out
        early whether memory suffices. The runner cannot be used after that.
        """
        for block in load_blocks(self.source, family, start=index):
            for _ in self._of_block(block, runner, family, Step(())):
                return

    def _of_block(
        self, block: Block, runner: Runner, family: Family, step: Step
    ) -> Iterator[Tensors]:
        for name in block.tensors:
            finite(name, block.tensors[name])
        live = runner.enter(block)
        block.tensors.clear()
        self.source.close_files()
        if self.method.calibrated:
            live = self._prepare(live, family, step)
        written = self._quantize(live, family, step)
        runner.leave(live)
        yield written

    def _prepare(self, live: RunningBlock, family: Family, step: Step) -> RunningBlock:
        """Move scales between the block's layers, and record the inputs of the original's layers.
        Returns the block whose statistics tell the deviations from the original.
        """
        linears = set(self.planned.linears)
        groups = [
            group
            for stage in family.stages(live.names)
            for group in stage
            if not family.is_expert(group[0])
        ]
        quantized = {
            layer
            for group in groups
            for layer in group
            if live.prefix + family.on_disk(layer) in linears
        }
        left = self.method.prepare(live.module, family, lambda: live.statistics(groups), quantized)
        left += self._smooth_others(live, family, groups, quantized)
        step.unscaled += [live.prefix + family.on_disk(layer) for layer in left]
        quantizing = live.record_original([group for group in groups if group[0] in quantized])
        if quantizing.expert_tokens:
            step.experts[live.prefix.removesuffix(".")] = quantizing.expert_tokens
        return quantizing

    def _quantize(self, live: RunningBlock, family: Family, step: Step) -> Tensors:
        """Quantize a block in place. Returns its tensors as they are written to disk."""
        linears = set(self.planned.linears)
        written: Tensors = {}
        for name, dtype in live.dtypes.items():
            if name.removesuffix(".weight") not in linears:
                # Rounded to its dtype before the layers are quantized, so that they compensate for
                # the rounding of scales that were moved into it.
                tensor = live.tensor(family.in_module(name.removeprefix(live.prefix)))
                written[name] = self._converted(tensor.to(dtype)).cpu()
                tensor.copy_(written[name])
        for stage in family.stages(live.names):
            for groups in _in_parts(stage, live):
                wanted = [g for g in groups if live.prefix + family.on_disk(g[0]) in linears]
                statistics = live.statistics(wanted) if wanted and self.method.calibrated else {}
                for group in wanted:
                    of_group = statistics.pop(group[0], None)
                    written |= self._of_group(group, of_group, live, family, step)
        if self.planned.kv:
            for name, largest in zip(KV_SCALES, live.key_value_range(), strict=True):
                written[live.prefix + name] = torch.tensor([kv_scale(largest)])
        return written

    def _of_group(
        self,
        group: Group,
        statistics: InputStatistics | None,
        live: RunningBlock,
        family: Family,
        step: Step,
    ) -> Tensors:
        written: Tensors = {}
        for layer in group:
            prefix, weight_OI = live.prefix + family.on_disk(layer), live.weight(layer)
            scale_dtype = self._scale_dtype(prefix, live.dtypes[f"{prefix}.weight"])
            result = self._method_of(prefix).quantize(weight_OI, statistics, scale_dtype)
            step.layers.append(LayerResult.of(prefix, weight_OI, result, statistics))
            written |= self.layout.tensors(prefix, _on_cpu(result.weight))
            weight_OI.copy_(result.weight.dequantize())
            self.advance(1)
        return written

    def _smooth_others(
        self,
        live: RunningBlock,
        family: Family,
        groups: list[Group],
        quantized: Collection[str],
    ) -> list[str]:
        """Smooth the W8A8 layers of a mixed plan, as the method int8 does in `prepare`."""
        schemes = {
            layer: scheme
            for group in groups
            for layer in group
            if (scheme := self.planned.others.get(live.prefix + family.on_disk(layer)))
            and scheme.activation_bits == 8
        }
        if not schemes:
            return []
        args = next(iter(schemes.values())).weights
        return smoothing.search(
            live.module,
            family,
            live.statistics([group for group in groups if group[0] in schemes]),
            lambda weights, given: int8.search_scales(weights, given, args),
            quantized,
            only=schemes,
        )

    def _converted(self, tensor: Tensor) -> Tensor:
        """A tensor that is not quantized, in the dtype that the plan has for it."""
        wanted = self.planned.convert_to
        return tensor.to(getattr(torch, wanted)) if wanted else tensor

    def _method_of(self, prefix: str) -> Method:
        scheme = self.planned.scheme_of(prefix)
        if scheme == self.method.scheme:
            return self.method
        return methods.make("int8" if scheme.activation_bits == 8 else self.planned.method, scheme)

    def _scale_dtype(self, prefix: str, dtype: torch.dtype) -> torch.dtype:
        """float32 for W8A8, as its kernels read them; else the model's half dtype."""
        if self.planned.scheme_of(prefix).activation_bits == 8:
            return torch.float32
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def _in_parts(stage: list[Group], live: RunningBlock) -> Iterator[list[Group]]:
    """The groups of a stage in parts whose Hessians together take STATISTICS_BYTES at most."""
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
    """The tensor. Raises BadInput when it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise BadInput(f"Tensor {name} holds NaN or infinity; the checkpoint is broken.")
    return tensor


def kv_scale(largest: float) -> float:
    """The smallest power of two that scales values up to `largest` into float8's range. Division by
    a power of two rounds nothing; other scales cost more than they gain (docs/lab-log.md).
    """
    return 2.0 ** math.ceil(math.log2(max(largest, 1e-6) / FP8_MAX))


def _merged(parts: Iterable[Tensors]) -> Iterator[Tensors]:
    """All parts as one."""
    merged: Tensors = {}
    for tensors in parts:
        merged |= tensors
    yield merged


def _on_cpu(weight: QuantizedWeight) -> QuantizedWeight:
    zeros_OG = None if weight.zeros_OG is None else weight.zeros_OG.cpu()
    return QuantizedWeight(weight.codes_OI.cpu(), weight.scales_OG.cpu(), weight.args, zeros_OG)
