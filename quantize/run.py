"""The whole pipeline of `quantize model`, as one function that reads from top to bottom."""

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from packhorse.quantize import formats, methods
from packhorse.quantize.calibration import text as calibration
from packhorse.quantize.calibration.activation_store import Shelf
from packhorse.quantize.calibration.block_loader import largest_block
from packhorse.quantize.calibration.runner import Runner
from packhorse.quantize.calibration.statistics import TOKENS_AT_ONCE
from packhorse.quantize.calibration.text import Calibration
from packhorse.quantize.errors import BadInput, OutOfMemory
from packhorse.quantize.methods.bit_allocation import measure_costs, spend_budget
from packhorse.quantize.model import families, sizes
from packhorse.quantize.model.checkpoint import REPORT, Checkpoint, find, sha256_of
from packhorse.quantize.model.families import Family
from packhorse.quantize.model.memory import free_memory_bytes, return_freed_memory
from packhorse.quantize.output.convert import Converter
from packhorse.quantize.output.workspace import SHARD_BYTES, Workspace
from packhorse.quantize.plan import estimates
from packhorse.quantize.plan.host import this_host, unprovable
from packhorse.quantize.plan.plan import Plan
from packhorse.quantize.plan.planner import plan
from packhorse.quantize.plan.targets import number
from packhorse.quantize.quality import eval_data as yardsticks
from packhorse.quantize.quality.engine_check import verify
from packhorse.quantize.report.report import (
    Layer,
    Progress,
    Report,
    Stage,
    doubts,
    measure,
    measure_distance,
    peak_memory_bytes,
    rare_experts,
)
from packhorse.quantize.settings import Settings
from transformers import AutoTokenizer

SPILL_ABOVE = 16 * 1024**3
"""Where the system does not say how much memory is free."""
DISK_MARGIN = 1.05
"""Over the planned size: the report, and what the plan's arithmetic leaves out."""


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
    end when vLLM does not run what was made. A run that ends early, however it does, leaves its
    finished steps beside `out`, from which the same settings with `resume` go on to the same bytes.
    """
    return_freed_memory()
    settings = replace(settings, spill_above=_spill_above(settings))  # what is free will change
    source, family, planned = decide(settings)
    device = device_of(settings)
    yardstick = yardsticks.find(source.folder, settings)
    report = Report(
        source=settings.model,
        plan=planned.as_json(),
        bytes_before=source.weight_bytes(),
        yardstick=yardstick.as_json(),
        notes=[*planned.notes, *yardsticks.missing(yardstick, settings)],
        seed=settings.seed,
        versions=_versions(),
    )
    text = _calibration(source, planned, settings, report)
    yardsticks.look_through(source.folder, yardstick)
    with Workspace(
        settings.out,
        source.folder,
        overwrite=settings.overwrite,
        needed_bytes=_disk_bytes(source, family, planned, text, settings),
    ) as work:
        this_run = _identity(source, planned, text, settings, report, progress)
        if work.begin(this_run, resume=settings.resume, restart=settings.restart):
            report.notes.append(f"resumed after {len(work.steps)} of its steps")
        if planned.budget:
            planned = _spend(source, family, planned, text, work, settings, report, progress)
        method = methods.make(planned.method, planned.scheme)
        layout = formats.make(planned.format, planned.scheme, planned.others)
        config = layout.config(ignore=planned.ignored, kv_scales=planned.kv)
        advance = progress("quantizing layers", len(planned.linears))
        converter = Converter(source, planned, method, layout, advance)
        with memory_errors(planned):
            _convert(converter, family, text, work, device, settings)
        started_s = time.monotonic()
        work.finish_weights()
        work.copy_side_files(source)
        work.write_json("config.json", _config(source, config, planned))
        if planned.format == "gptq":
            # Readers older than `quantization_config` look here.
            work.write_json("quantize_config.json", config)
        made = Checkpoint(work.folder)
        report.layers = [Layer(**layer) for step in work.steps for layer in step["layers"]]
        report.experts = {k: v for step in work.steps for k, v in step["experts"].items()}
        report.notes += rare_experts(report.experts)
        report.unscaled = [name for step in work.steps for name in step["unscaled"]]
        report.bytes_after = made.weight_bytes()
        report.weights_sha256 = sha256_of(made.weight_files())
        report.seconds = sum(step["seconds"] for step in work.steps)
        report.seconds += time.monotonic() - started_s
        report.stages.append(Stage("quantizing", round(report.seconds, 2), peak_memory_bytes()))
        _measure(report, source, work, yardstick, progress)
        if settings.verify and planned.unprovable:
            report.notes.append(f"no load proof: {planned.unprovable}")
        elif settings.verify:
            gc.collect()
            torch.cuda.empty_cache()  # the engine, in another process, looks for free memory
            rows = None if text is None else text.rows
            prompts = yardsticks.prompts(source.folder, yardstick, rows)
            with report.stage("loading in vLLM"):
                report.proof = verify(source.folder, work.folder, prompts, progress)
            report.notes += doubts(report.proof)
        work.write_json(REPORT, report.as_json())
        work.publish()
    return report


def _measure(
    report: Report,
    source: Checkpoint,
    work: Workspace,
    yardstick: yardsticks.Yardstick,
    progress: Progress,
) -> None:
    report.weights_before = sizes.of(source.folder)
    report.weights_after = sizes.of(work.folder)
    needed, free = 2 * report.weights_before["parameters"], free_memory_bytes()
    if (yardstick.eval_file or yardstick.text_file) and free is not None and free < needed:
        report.notes.append(
            f"quality not measured: dequantized, the model takes {needed:,} bytes of memory; "
            f"{free:,} are free here (a container's limit counts)"
        )
        return
    with report.stage("measuring the original"):
        report.quality_before = measure(source.folder, yardstick, "before", progress)
    with report.stage("measuring the result"):
        report.quality_after = measure(work.folder, yardstick, "after", progress)
    with report.stage("comparing predictions"):
        report.distance = measure_distance(source.folder, work.folder, yardstick, progress)
    if report.distance and "left_out" in report.distance:
        report.notes.append(f"predictions not compared: {report.distance['left_out']}")


def _spend(
    source: Checkpoint,
    family: Family | None,
    planned: Plan,
    text: Calibration | None,
    work: Workspace,
    settings: Settings,
    report: Report,
    progress: Progress,
) -> Plan:
    """The plan with its budget spent; measured once, however often the run is cut short."""
    assert text is not None
    assert family is not None
    costs = work.remembered("costs")
    if costs is None:
        with memory_errors(planned):
            shelf = _shelf(settings, work)
            costs = measure_costs(
                source, family, planned, text.rows, device_of(settings), shelf, progress
            )
        work.remember("costs", costs)
    planned, told = spend_budget(source, planned, costs)
    without_proof = (
        unprovable(scheme, this_host(), kv=planned.kv)
        for scheme in {planned.scheme, *planned.others.values()}
    )
    planned = replace(planned, unprovable=next(filter(None, without_proof), None))
    report.plan = {**planned.as_json(), "precision": told}
    return planned


def _shelf(settings: Settings, work: Workspace) -> Shelf:
    return Shelf(settings.spill_above, work.spill, work.save)


def _spill_above(settings: Settings) -> int:
    if settings.spill_above is not None:
        return settings.spill_above
    free = free_memory_bytes()
    return (SPILL_ABOVE if free is None else free) // 2


def _convert(
    converter: Converter,
    family: Family | None,
    text: Calibration | None,
    work: Workspace,
    device: torch.device,
    settings: Settings,
) -> None:
    """All steps that are not finished yet."""
    done = len(work.steps)
    converter.advance(sum(len(step["layers"]) for step in work.steps))
    if text is None or family is None:
        steps = converter.by_weights(done)
    else:
        shelf = _shelf(settings, work)
        largest = largest_block(converter.source, family)
        if largest and not done:
            rehearsal = replace(converter, advance=lambda layers: None)
            again = Runner(converter.source, family, text.rows, device, shelf)
            rehearsal.rehearse(again, family, largest)
            del again
            shelf.drop()
        runner = Runner(converter.source, family, text.rows, device, shelf)
        if done:
            runner.restore(work.state())
        steps = converter.by_blocks(runner, family, done)
    for step in steps:
        work.finish_step(step.parts, step.said, step.state)


def _identity(
    source: Checkpoint,
    planned: Plan,
    text: Calibration | None,
    settings: Settings,
    report: Report,
    progress: Progress,
) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    advance = progress("hashing the original", len(source.weight_files()))
    digests = {}
    for path in source.weight_files():
        digests[path.name] = sha256_of([path])
        advance(1)
    plan = report.plan
    decided = (
        "method",
        "scheme",
        "format",
        "group_size",
        "symmetric",
        "kv_scales",
        "converted_to",
        "budget",
        "ignored",
    )
    return {
        **{key: plan[key] for key in decided},
        "weights": digests,
        "config": source.config,
        "calibration": report.calibration,
        "keep": list(settings.keep),
        "choices": [repr(scheme) for scheme in planned.choices],
        "side files": sha256_of([source.folder / name for name in source.side_files()]),
        "calibration rows": None if text is None else text.digest,
        "seed": settings.seed,
        "device": str(device_of(settings)),
        "threads": torch.get_num_threads(),
        "tokens at once": TOKENS_AT_ONCE,
        **report.versions,
    }


def _disk_bytes(
    source: Checkpoint,
    family: Family | None,
    planned: Plan,
    text: Calibration | None,
    settings: Settings,
) -> int:
    """What a run needs at its worst moment: the result, a shard of it twice, hidden states of both
    models, before and behind a block, and what waits in files.
    """
    result = DISK_MARGIN * (planned.bytes_after + source.side_bytes())
    needed = round(result) + min(planned.bytes_after, SHARD_BYTES)
    if text is None:
        return needed
    hidden_size = number(source, "hidden_size")
    layers = {name: source.shape_of_weight(name) for name in planned.linears}
    waiting = estimates.waiting(layers, family, tokens=text.num_tokens, hidden_size=hidden_size)
    if planned.budget:
        waiting = max(waiting, estimates.changed(layers, hidden_size=hidden_size))
    assert settings.spill_above is not None
    spilled = max(0, waiting - settings.spill_above)
    return needed + 2 * 2 * 4 * text.num_tokens * hidden_size + spilled


def device_of(settings: Settings) -> torch.device:
    """Where blocks run. Raises BadInput for one that is not there."""
    there = torch.cuda.is_available()
    if settings.device == "auto":
        return torch.device("cuda" if there else "cpu")
    if settings.device not in ("cpu", "cuda"):
        raise BadInput(f"--device {settings.device} is not known; give auto, cpu or cuda.")
    if settings.device == "cuda" and not there:
        raise BadInput("--device cuda: torch finds no GPU here; leave it out, or give cpu.")
    return torch.device(settings.device)


@contextmanager
def memory_errors(planned: Plan) -> Iterator[None]:
    """Raises OutOfMemory for what torch and Python say when there is no more."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error).lower()
        named = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not named and "allocate memory" not in words and "not enough memory" not in words:
            raise
        raise OutOfMemory(
            f"The memory is full; the plan was for {planned.peak_memory_bytes / 1e9:.1f} GB. Take "
            "fewer --calibration-tokens, a lower --spill-above, or another --device."
        ) from error


def _versions() -> dict[str, str]:
    names = ("packhorse", "torch", "transformers", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


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


def _config(source: Checkpoint, quantization: dict[str, Any], planned: Plan) -> dict[str, Any]:
    config = {**source.config, "quantization_config": quantization}
    if planned.convert_to:
        config.pop("torch_dtype", None)
        config["dtype"] = planned.convert_to
    return config
