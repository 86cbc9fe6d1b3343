"""The pipeline of `quantize model`, as one function that reads from top to bottom."""

from __future__ import annotations

import gc
import importlib.metadata
import time
from dataclasses import replace
from typing import Any

import torch

from packhorse.quantize import formats, methods
from packhorse.quantize.calibration import text as calibration
from packhorse.quantize.calibration.activation_store import ActivationStore
from packhorse.quantize.calibration.block_loader import largest_block
from packhorse.quantize.calibration.runner import Runner, device_of
from packhorse.quantize.calibration.text import Calibration
from packhorse.quantize.errors import BadInput
from packhorse.quantize.methods.bit_allocation import spend_budget
from packhorse.quantize.model import families, sizes
from packhorse.quantize.model.checkpoint import REPORT, Checkpoint, find, sha256_of
from packhorse.quantize.model.families import Family
from packhorse.quantize.model.memory import (
    free_memory_bytes,
    memory_errors,
    peak_memory_bytes,
    return_freed_memory,
)
from packhorse.quantize.output.convert import Converter, LayerResult
from packhorse.quantize.output.run_identity import identity_of
from packhorse.quantize.output.workspace import SHARD_BYTES, Workspace
from packhorse.quantize.plan.estimates import disk_bytes
from packhorse.quantize.plan.host import not_checkable_here, this_host
from packhorse.quantize.plan.plan import Plan
from packhorse.quantize.plan.planner import plan
from packhorse.quantize.quality import eval_data as evaluation
from packhorse.quantize.quality.engine_check import verify
from packhorse.quantize.quality.eval_data import EvalData
from packhorse.quantize.quality.measure import measure, measure_divergence
from packhorse.quantize.quality.sensitivity import measure_costs
from packhorse.quantize.report.report import Report, Stage, load_check_notes, rare_expert_notes
from packhorse.quantize.settings import Progress, Settings

FREE_MEMORY_BYTES = 16 * 1024**3
"""Assumed where the system does not tell how much memory is free."""


def decide(settings: Settings) -> tuple[Checkpoint, Family | None, Plan]:
    """Plan a run without doing any work. Raises QuantizeError when it cannot be done."""
    source = Checkpoint(find(settings.model))
    family = families.FAMILIES.get(str(source.config.get("model_type")))
    return source, family, plan(settings, source, family)


@torch.inference_mode()
def run(settings: Settings, progress: Progress) -> Report:
    """Quantize a checkpoint into a new folder, and return its report, which is also in the folder.

    Raises QuantizeError before any long work when something cannot be done, and Unloadable at the
    end when the load check fails. A run that ends early, in any way, leaves its finished steps
    beside `out`. A run with the same settings and `resume` continues from them and makes the same
    bytes.
    """
    return_freed_memory()
    # The limit is fixed here, as free memory changes during the run.
    settings = replace(settings, offload_limit_bytes=_offload_limit_bytes(settings))
    source, family, planned = decide(settings)
    device = device_of(settings.device)
    eval_data = evaluation.find(source.folder, settings)
    report = Report(
        source=settings.model,
        plan=planned.as_json(),
        bytes_before=source.weight_bytes(),
        eval_data=eval_data.as_json(),
        notes=[*planned.notes, *evaluation.missing_notes(eval_data, settings)],
        seed=settings.seed,
        versions=_versions(),
    )
    text = _calibration_text(source, planned, settings, report)
    evaluation.check(source.folder, eval_data)
    with Workspace(
        settings.out,
        source.folder,
        overwrite=settings.overwrite,
        needed_bytes=_disk_bytes(source, family, planned, text, settings),
    ) as work:
        advance = progress("hashing the original", len(source.weight_files()))
        identity = identity_of(
            source, planned, text, keep=settings.keep, seed=settings.seed, device=device,
            versions=report.versions, advance=advance,
        )  # fmt: skip
        if work.begin(identity, resume=settings.resume, restart=settings.restart):
            report.notes.append(f"resumed after {len(work.steps)} of its steps")
        store = ActivationStore(settings.offload_limit_bytes, work.offload_folder, work.save)
        if planned.budget:
            planned, report.plan = _spend_budget(
                source, family, planned, text, work, device, store, progress
            )
        method = methods.make(planned.method, planned.scheme)
        layout = formats.make(planned.format, planned.scheme, planned.others)
        config = layout.config(ignore=planned.ignored, kv_scales=planned.kv)
        advance = progress("quantizing layers", len(planned.linears))
        converter = Converter(source, planned, method, layout, advance)
        with memory_errors(planned.peak_memory_bytes):
            _convert(converter, family, text, work, device, store)
        started_s = time.monotonic()
        work.finish_weights()
        work.copy_side_files(source)
        work.write_json("config.json", _config(source, config, planned))
        if planned.format == "gptq":
            # Readers that do not know `quantization_config` read this file.
            work.write_json("quantize_config.json", config)
        quantized = Checkpoint(work.folder)
        report.layers = [LayerResult(**layer) for step in work.steps for layer in step["layers"]]
        report.experts = {k: v for step in work.steps for k, v in step["experts"].items()}
        report.notes += rare_expert_notes(report.experts)
        report.unscaled = [name for step in work.steps for name in step["unscaled"]]
        report.bytes_after = quantized.weight_bytes()
        report.weights_sha256 = sha256_of(quantized.weight_files())
        report.seconds = sum(step["seconds"] for step in work.steps)
        report.seconds += time.monotonic() - started_s
        report.stages.append(Stage("quantizing", round(report.seconds, 2), peak_memory_bytes()))
        _measure(report, source, work, eval_data, progress)
        if settings.verify and planned.not_checkable_here:
            report.notes.append(f"no load check: {planned.not_checkable_here}")
        elif settings.verify:
            gc.collect()
            torch.cuda.empty_cache()  # the engine, in another process, needs the memory
            rows = None if text is None else text.rows
            prompts = evaluation.prompts(source.folder, eval_data, rows)
            with report.stage("loading in vLLM"):
                report.load_check = verify(source.folder, work.folder, prompts, progress)
            report.notes += load_check_notes(report.load_check)
        work.write_json(REPORT, report.as_json())
        work.publish()
    return report


def _offload_limit_bytes(settings: Settings) -> int:
    if settings.offload_limit_bytes is not None:
        return settings.offload_limit_bytes
    free = free_memory_bytes()
    return (FREE_MEMORY_BYTES if free is None else free) // 2


def _versions() -> dict[str, str]:
    names = ("packhorse", "torch", "transformers", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def _calibration_text(
    source: Checkpoint, planned: Plan, settings: Settings, report: Report
) -> Calibration | None:
    """The calibration text; None for a method without calibration, and for one that can do without
    when there is no text. Raises BadInput.
    """
    if not planned.calibrated:
        if settings.calibration:
            raise BadInput(f"--calibration: {planned.method} does not use it; leave it out.")
        return None
    place = calibration.find(source.folder, settings.calibration)
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
    text = calibration.read(
        place,
        calibration.tokenizer_for(source.folder),
        max_tokens=settings.calibration_tokens,
        sequence_length=planned.sequence_length,
        seed=settings.seed,
        force=settings.force,
    )
    report.calibration = text.as_json()
    if not settings.force:
        digests = {entry["sha256"] for entry in report.eval_data.values()}
        calibration.refuse_evaluation_text(text, digests)
    return text


def _disk_bytes(
    source: Checkpoint,
    family: Family | None,
    planned: Plan,
    text: Calibration | None,
    settings: Settings,
) -> int:
    assert settings.offload_limit_bytes is not None
    return disk_bytes(
        {name: source.shape_of_weight(name) for name in planned.linears},
        family,
        result_bytes=planned.bytes_after,
        side_bytes=source.side_bytes(),
        shard_bytes=SHARD_BYTES,
        tokens=0 if text is None else text.num_tokens,
        hidden_size=source.number("hidden_size"),
        offload_limit_bytes=settings.offload_limit_bytes,
        mixed=planned.budget is not None,
    )


def _spend_budget(
    source: Checkpoint,
    family: Family | None,
    planned: Plan,
    text: Calibration | None,
    work: Workspace,
    device: torch.device,
    store: ActivationStore,
    progress: Progress,
) -> tuple[Plan, dict[str, Any]]:
    """The plan with a scheme for each layer, and its JSON with the costs. Costs are measured once,
    however often the run is resumed.
    """
    assert text is not None
    assert family is not None
    costs = work.saved_value("costs")
    if costs is None:
        with memory_errors(planned.peak_memory_bytes):
            costs = measure_costs(source, family, planned, text.rows, device, store, progress)
        work.save_value("costs", costs)
    planned, precision = spend_budget(source, planned, costs)
    reasons = (
        not_checkable_here(scheme, this_host(), kv=planned.kv)
        for scheme in {planned.scheme, *planned.others.values()}
    )
    planned = replace(planned, not_checkable_here=next(filter(None, reasons), None))
    return planned, {**planned.as_json(), "precision": precision}


def _convert(
    converter: Converter,
    family: Family | None,
    text: Calibration | None,
    work: Workspace,
    device: torch.device,
    store: ActivationStore,
) -> None:
    """Carry out the steps that are not finished yet."""
    done = len(work.steps)
    converter.advance(sum(len(step["layers"]) for step in work.steps))
    if text is None or family is None:
        steps = converter.by_weights(done)
    else:
        largest = largest_block(converter.source, family)
        if largest and not done:
            # The largest block first, so that too little memory shows at once.
            runner = Runner(converter.source, family, text.rows, device, store)
            silent = replace(converter, advance=lambda layers: None)
            silent.dry_run(runner, family, largest)
            del runner
            store.drop()
        runner = Runner(converter.source, family, text.rows, device, store)
        if done:
            runner.restore(work.state())
        steps = converter.by_blocks(runner, family, done)
    for step in steps:
        work.finish_step(step.parts, step.summary, step.state)


def _config(source: Checkpoint, quantization: dict[str, Any], planned: Plan) -> dict[str, Any]:
    """The result's config.json."""
    config = {**source.config, "quantization_config": quantization}
    if planned.convert_to:
        config.pop("torch_dtype", None)
        config["dtype"] = planned.convert_to
    return config


def _measure(
    report: Report,
    source: Checkpoint,
    work: Workspace,
    eval_data: EvalData,
    progress: Progress,
) -> None:
    """Fill in sizes and quality before and after. Quality needs the dequantized models in memory;
    where they do not fit, it is left out with a note.
    """
    report.weights_before = sizes.of(source.folder)
    report.weights_after = sizes.of(work.folder)
    needed, free = 2 * report.weights_before["parameters"], free_memory_bytes()
    if (eval_data.eval_file or eval_data.text_file) and free is not None and free < needed:
        report.notes.append(
            f"quality not measured: dequantized, the model takes {needed:,} bytes of memory; "
            f"{free:,} are free here (a container's limit counts)"
        )
        return
    with report.stage("measuring the original"):
        report.quality_before = measure(source.folder, eval_data, "before", progress)
    with report.stage("measuring the result"):
        report.quality_after = measure(work.folder, eval_data, "after", progress)
    with report.stage("comparing predictions"):
        report.divergence = measure_divergence(source.folder, work.folder, eval_data, progress)
    if report.divergence and "left_out" in report.divergence:
        report.notes.append(f"predictions not compared: {report.divergence['left_out']}")
