"""The whole pipeline of `quantize model`, as one function that reads from top to bottom."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any

import torch

from quantize import families, formats, methods
from quantize.blocks import Block, count_blocks, walk
from quantize.checkpoint import REPORT, Checkpoint, Writer, find, sha256_of
from quantize.errors import BadInput, Unsupported
from quantize.families import Family
from quantize.grid import relative_error
from quantize.methods import Method
from quantize.report import Layer, Progress, Report, Yardstick, measure
from quantize.settings import Settings

GROUP_SIZES = (32, 64, 128)


def run(settings: Settings, progress: Progress) -> Report:
    """Quantize one checkpoint into a new folder and return its report, which also lies in the
    folder.

    Raises QuantizeError before any long work when something cannot be done; leaves no half-written
    folder behind.
    """
    source = Checkpoint(find(settings.model))
    family = _family(source)
    group_size = _group_size(source, family, settings)
    method = methods.make(settings.method, group_size=group_size)
    if settings.group_size and method.grid.group_size is None:
        raise BadInput(f"--group-size: {method.name} has one scale per output; leave it out.")
    layout = formats.by_name(method.format)
    yardstick = _yardstick(source.folder, settings)
    notes = _notes(source, method, yardstick, settings)
    report = Report(
        source=settings.model,
        method=method.name,
        format=method.format,
        bits=method.grid.bits,
        group_size=method.grid.group_size,
        bytes_before=source.weight_bytes(),
        yardstick=yardstick.as_json(),
        notes=notes,
        versions={
            name: importlib.metadata.version(name)
            for name in ("packhorse", "torch", "transformers")
        },
    )
    with Writer(settings.out, source.folder, overwrite=settings.overwrite) as writer:
        report.quality_before = measure(source.folder, yardstick, "before", progress)
        started_s = time.monotonic()
        advance = progress("quantizing blocks", count_blocks(source, family))
        for block in walk(source, family):
            writer.add(_quantize_block(block, family, method, layout, report))
            if block.index >= 0:
                advance(1)
        writer.finish_weights()
        writer.copy_side_files(source)
        writer.write_json("config.json", _config(source, method, layout))
        if method.format == "gptq":
            # Readers older than `quantization_config` look here.
            writer.write_json("quantize_config.json", layout.config(method.grid))
        made = Checkpoint(writer.folder)
        report.bytes_after = made.weight_bytes()
        report.weights_sha256 = sha256_of(made.weight_files())
        report.seconds = time.monotonic() - started_s
        report.quality_after = measure(writer.folder, yardstick, "after", progress)
        writer.write_json(REPORT, report.as_json())
        writer.publish()
    return report


def _quantize_block(
    block: Block, family: Family, method: Method, layout: formats.Format, report: Report
) -> dict[str, torch.Tensor]:
    """The block's tensors as they go to disk: linear weights as codes, the rest as they are (W8A8:
    in bf16).
    """
    written: dict[str, torch.Tensor] = {}
    linear_weights = (
        {f"{block.prefix}{name}.weight" for name in family.linears} if block.index >= 0 else set()
    )
    for name, tensor in block.tensors.items():
        if not torch.isfinite(tensor).all():
            raise BadInput(f"Tensor {name} holds NaN or infinity; the checkpoint is broken.")
        if name in linear_weights:
            prefix = name.removesuffix(".weight")
            codes = method.quantize(tensor)
            report.layers.append(Layer(prefix, codes.grid.bits, relative_error(tensor, codes)))
            written |= layout.tensors(prefix, codes)
        elif block.index >= 0 and tensor.ndim > 1:
            raise Unsupported(f"{name} is a weight that this version does not know how to treat.")
        else:
            written[name] = tensor.to(torch.bfloat16) if method.activation_bits == 8 else tensor
    if missing := linear_weights - block.tensors.keys():
        raise BadInput(f"The checkpoint has no tensor {min(missing)}; it is incomplete.")
    return written


def _config(source: Checkpoint, method: Method, layout: formats.Format) -> dict[str, Any]:
    config = {**source.config, "quantization_config": layout.config(method.grid)}
    if method.activation_bits == 8:
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
    return config


def _family(source: Checkpoint) -> Family:
    if source.config.get("quantization_config"):
        method = source.config["quantization_config"].get("quant_method")
        raise Unsupported(
            f"{source.folder} is quantized already ({method}); start from the original checkpoint."
        )
    return families.family_of(str(source.config.get("model_type")))


def _group_size(source: Checkpoint, family: Family, settings: Settings) -> int:
    """The wanted group size, or the largest below it that divides every linear layer's inputs."""
    wanted = settings.group_size or max(GROUP_SIZES)
    if wanted not in GROUP_SIZES:
        raise BadInput(f"--group-size {wanted}: vLLM loads groups of 32, 64 or 128.")
    widths = set()
    for name in family.linears:
        prefix = f"{family.block_prefix}0.{name}.weight"
        if prefix not in source:
            raise BadInput(f"{source.folder} has no tensor {prefix}; it is incomplete.")
        (outputs, inputs), _ = source.shape_and_dtype(prefix)
        if outputs % 32 or inputs % 32:
            raise Unsupported(
                f"{name} is {outputs} x {inputs}; vLLM's kernels need multiples of 32."
            )
        widths.add(inputs)
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    return max(size for size in fitting if size <= wanted)


def _yardstick(folder: Path, settings: Settings) -> Yardstick:
    """The files named in the settings, or those that lie where a demo keeps them."""
    if not settings.quality:
        return Yardstick()
    beside = folder.absolute().parent / "eval"
    named = {"eval": settings.eval_file, "text": settings.text_file}
    usual = {"eval": beside / "general.jsonl", "text": beside / "held_out_text.jsonl"}
    for path in named.values():
        if path is not None and not path.is_file():
            raise BadInput(f"{path}: no such file.")
    chosen = {
        kind: named[kind] or (usual[kind] if usual[kind].is_file() else None) for kind in named
    }
    return Yardstick(chosen["eval"], chosen["text"])


def _notes(
    source: Checkpoint, method: Method, yardstick: Yardstick, settings: Settings
) -> list[str]:
    notes = []
    _, dtype = source.shape_and_dtype(source.names()[0])
    if method.activation_bits == 8 and dtype != "BF16":
        notes.append(f"converted from {dtype} to bfloat16: W8A8 kernels need it")
    wanted = settings.group_size or max(GROUP_SIZES)
    if method.grid.group_size not in (None, wanted):
        notes.append(
            f"group size {method.grid.group_size} instead of {wanted}: it divides all layers"
        )
    if settings.quality and not yardstick.text_file:
        notes.append("perplexity not measured: no --text file")
    if settings.quality and not yardstick.eval_file:
        notes.append("score not measured: no --eval file")
    return notes
