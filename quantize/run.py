"""The whole pipeline of `quantize model`, as one function that reads from top to bottom."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from quantize import calibration, families, formats, methods
from quantize.blocks import Block, LiveBlock, Runner, count_blocks, walk
from quantize.calibration import Calibration
from quantize.checkpoint import REPORT, Checkpoint, Writer, find, sha256_of
from quantize.errors import BadInput
from quantize.evaluate import prompt_of, read_questions, read_texts
from quantize.families import Family
from quantize.formats import Format
from quantize.grid import FP8_MAX, Codes
from quantize.methods import Method, Rounded
from quantize.plan import Plan
from quantize.planner import plan
from quantize.report import Layer, Progress, Report, Yardstick, measure
from quantize.settings import Settings
from quantize.verify import verify

PROOF_PROMPTS = 16
SUSPICIOUS_NATS = 0.5
DISK_MARGIN = 1.05
"""Over the planned size: the report, and what the plan's arithmetic leaves out."""
KV_SCALES = ("self_attn.k_scale", "self_attn.v_scale")


def decide(settings: Settings) -> tuple[Checkpoint, Family | None, Plan]:
    """What a run will do, without doing it. Raises QuantizeError when it cannot be done."""
    source = Checkpoint(find(settings.model))
    family = families.FAMILIES.get(str(source.config.get("model_type")))
    return source, family, plan(settings, source, family)


@torch.inference_mode()
def run(settings: Settings, progress: Progress) -> Report:
    """Quantize one checkpoint into a new folder and return its report, which also lies in the
    folder.

    Raises QuantizeError before any long work when something cannot be done, or Unloadable at the
    end when vLLM does not run what was made; leaves no half-written folder behind.
    """
    source, family, planned = decide(settings)
    method = methods.make(planned.method, planned.scheme)
    layout = formats.make(planned.format, planned.scheme)
    config = layout.config(ignore=planned.ignored, kv_scales=planned.kv)
    yardstick = _yardstick(source.folder, settings)
    report = Report(
        source=settings.model,
        plan=planned.as_json(),
        bytes_before=source.weight_bytes(),
        yardstick=yardstick.as_json(),
        notes=[*planned.notes, *_notes(yardstick, settings)],
        versions={
            name: importlib.metadata.version(name)
            for name in ("packhorse", "torch", "transformers")
        },
    )
    with Writer(
        settings.out,
        source.folder,
        overwrite=settings.overwrite,
        needed_bytes=round(DISK_MARGIN * (planned.bytes_after + source.side_bytes())),
    ) as writer:
        text = _calibration(source, planned, settings, report)
        report.quality_before = measure(source.folder, yardstick, "before", progress)
        started_s = time.monotonic()
        if text is None or family is None:
            parts = _one_by_one(source, planned, method, layout, report, progress)
        else:
            parts = _block_by_block(source, family, planned, method, layout, text, report, progress)
        for tensors in parts:
            writer.add(tensors)
        writer.finish_weights()
        writer.copy_side_files(source)
        writer.write_json("config.json", _config(source, config, planned))
        if planned.format == "gptq":
            # Readers older than `quantization_config` look here.
            writer.write_json("quantize_config.json", config)
        made = Checkpoint(writer.folder)
        report.bytes_after = made.weight_bytes()
        report.weights_sha256 = sha256_of(made.weight_files())
        report.seconds = time.monotonic() - started_s
        report.quality_after = measure(writer.folder, yardstick, "after", progress)
        if settings.verify and planned.unprovable:
            report.notes.append(f"no load proof: {planned.unprovable}")
        elif settings.verify:
            gc.collect()
            torch.cuda.empty_cache()  # the engine, in another process, looks for free memory
            prompts = _prompts(source.folder, yardstick, text)
            report.proof = verify(source.folder, writer.folder, prompts, progress)
            report.notes += _doubts(report.proof)
        writer.write_json(REPORT, report.as_json())
        writer.publish()
    return report


def _one_by_one(
    source: Checkpoint,
    planned: Plan,
    method: Method,
    layout: Format,
    report: Report,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    """The tensors as they go to disk, for methods that look at nothing but the weights."""
    linears = set(planned.linears)
    advance = progress("quantizing layers", len(linears))
    for name in source.names():
        tensor = _finite(name, source.get(name))
        prefix = name.removesuffix(".weight")
        if prefix in linears and prefix != name:
            rounded = method.quantize(tensor, None, _scale_dtype(tensor, planned))
            report.layers.append(Layer.of(prefix, tensor, rounded))
            yield layout.tensors(prefix, rounded.codes)
            advance(1)
        else:
            yield {name: _stored(tensor, planned)}


def _block_by_block(
    source: Checkpoint,
    family: Family,
    planned: Plan,
    method: Method,
    layout: Format,
    text: Calibration,
    report: Report,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:
    """The tensors as they go to disk, each block quantized for what it is given by the quantized
    blocks before it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runner = Runner(source, family, text.rows, device)
    advance = progress("quantizing blocks", count_blocks(source, family))
    for block in walk(source, family):
        for name, tensor in block.tensors.items():
            _finite(name, tensor)
        if block.index < 0:
            yield {name: _stored(tensor, planned) for name, tensor in block.tensors.items()}
            continue
        live = runner.enter(block)
        yield _quantize_block(block, live, family, planned, method, layout, report)
        runner.leave(live)
        advance(1)


def _quantize_block(
    block: Block,
    live: LiveBlock,
    family: Family,
    planned: Plan,
    method: Method,
    layout: Format,
    report: Report,
) -> dict[str, Tensor]:
    """Quantize the live block in place; returns its tensors as they go to disk."""
    if method.calibrated:
        left = method.prepare(live.module, family, lambda: live.inputs(family.fused))
        report.unscaled += [block.prefix + layer for layer in left]
        live.keep_original()
    written: dict[str, Tensor] = {}
    for name, tensor in block.tensors.items():
        inner = name.removeprefix(block.prefix)
        if inner.removesuffix(".weight") not in family.linears:
            # Scales that were moved into it are rounded here, before others make up for it.
            written[name] = _stored(live.tensor(inner).to(tensor.dtype), planned).cpu()
            live.tensor(inner).copy_(written[name])
    for group in family.fused:
        inputs = live.inputs([group])[group[0]] if method.calibrated else None
        for name in group:
            weight_OI = live.weight(name)
            stored = block.tensors[f"{block.prefix}{name}.weight"]
            rounded = method.quantize(weight_OI, inputs, _scale_dtype(stored, planned))
            report.layers.append(Layer.of(block.prefix + name, weight_OI, rounded, inputs))
            written |= layout.tensors(block.prefix + name, _on_cpu(rounded).codes)
            weight_OI.copy_(rounded.codes.dequantize())
    if planned.kv:
        seen_range = live.key_value_range()
        for name, largest in zip(KV_SCALES, seen_range, strict=True):
            written[block.prefix + name] = torch.tensor([kv_scale(largest)])
    return written


def kv_scale(largest: float) -> float:
    """The smallest power of two that brings values up to `largest` into float8's range. A power of
    two, because dividing by it rounds nothing: other scales cost more than they gain (lab log).
    """
    return 2.0 ** math.ceil(math.log2(max(largest, 1e-6) / FP8_MAX))


def _calibration(
    source: Checkpoint, planned: Plan, settings: Settings, report: Report
) -> Calibration | None:
    """The text that layers are looked at with, or None where the method does without."""
    if not planned.calibrated:
        if settings.calibration:
            raise BadInput(f"--calibration: {planned.method} does not use it; leave it out.")
        return None
    usual = source.folder.absolute().parent / "calibration.jsonl"
    place = settings.calibration or (usual if usual.is_file() else None)
    if place is None:
        if planned.needs_text:
            raise BadInput(
                f"{planned.method} needs calibration text of the kind that the model will see: "
                'pass --calibration with a file or folder (JSON lines {"messages"} or {"text"}, '
                "or .txt), or the name of a dataset."
            )
        report.notes.append(
            "weights only: no --calibration text, so activations were not looked at"
        )
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{source.folder} has no tokenizer that loads, which calibration needs: {error}"
        ) from error
    text = calibration.read(
        place,
        tokenizer,
        max_tokens=settings.calibration_tokens,
        row_tokens=planned.row_tokens,
        seed=settings.seed,
        force=settings.force,
    )
    report.calibration = text.as_json()
    measured_with = {entry["sha256"] for entry in report.yardstick.values()}
    seen = {sha256_of([path]): path for path in text.files}
    if (both := measured_with & seen.keys()) and not settings.force:
        raise BadInput(
            f"{seen[both.pop()]} is also what quality is measured with, so the report would "
            "flatter; calibrate on other text, or pass --force."
        )
    return text


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise BadInput(f"Tensor {name} holds NaN or infinity; the checkpoint is broken.")
    return tensor


def _stored(tensor: Tensor, planned: Plan) -> Tensor:
    return tensor.to(getattr(torch, planned.convert_to)) if planned.convert_to else tensor


def _scale_dtype(weight: Tensor, planned: Plan) -> torch.dtype:
    """float32 for W8A8, as its kernels read them; else the model's dtype."""
    if planned.scheme.activation_bits == 8:
        return torch.float32
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return weight.dtype if half else torch.bfloat16


def _on_cpu(rounded: Rounded) -> Rounded:
    codes = rounded.codes
    zeros_OG = None if codes.zeros_OG is None else codes.zeros_OG.cpu()
    return Rounded(
        Codes(codes.codes_OI.cpu(), codes.scales_OG.cpu(), codes.grid, zeros_OG), rounded.note
    )


def _config(source: Checkpoint, quantization: dict[str, Any], planned: Plan) -> dict[str, Any]:
    config = {**source.config, "quantization_config": quantization}
    if planned.convert_to:
        config.pop("torch_dtype", None)
        config["dtype"] = planned.convert_to
    return config


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


def _prompts(folder: Path, yardstick: Yardstick, text: Calibration | None) -> list[list[int]]:
    """What the load proof asks: the evaluation's questions, else its text, else calibration rows;
    nothing (so that verify takes random tokens) without any.
    """
    if not (yardstick.eval_file or yardstick.text_file):
        return [] if text is None else [row.tolist() for row in text.rows[:PROOF_PROMPTS]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if yardstick.eval_file:
        questions = read_questions(yardstick.eval_file)
        chosen = questions[:: max(1, len(questions) // PROOF_PROMPTS)][:PROOF_PROMPTS]
        return [prompt_of(question, tokenizer) for question in chosen]
    assert yardstick.text_file is not None
    return read_texts(yardstick.text_file, tokenizer)[:PROOF_PROMPTS]


def _doubts(proof: dict[str, Any]) -> list[str]:
    """What a load proof that did not fail leaves open."""
    doubts = []
    moved = proof.get("compared", {}).get("logprob_difference_mean", 0.0)
    if moved > SUSPICIOUS_NATS:
        doubts.append(
            f"LOOK AT THIS: in vLLM log-probabilities moved by {moved:.2f} on average from the "
            f"original's, more than {SUSPICIOUS_NATS}: vLLM computes what the codes say, but the "
            "codes may be of no use"
        )
    if isinstance(proof["reference"], str):
        doubts.append(
            f"load proof: vLLM's results were not held to the codes: {proof['reference']}"
        )
    return doubts


def _notes(yardstick: Yardstick, settings: Settings) -> list[str]:
    notes = []
    if settings.quality and not yardstick.text_file:
        notes.append("perplexity not measured: no --text file")
    if settings.quality and not yardstick.eval_file:
        notes.append("score not measured: no --eval file")
    return notes
