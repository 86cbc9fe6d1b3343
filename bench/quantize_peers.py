"""Our quantization beside llm-compressor's and auto-round's: quality, seconds and memory.

    python bench/quantize_peers.py                     # hours the first time: it trains a model too
    python bench/quantize_peers.py --models demo --only gptq,llmc-gptq    # these again
    python bench/quantize_peers.py --quick             # minutes; the figures mean nothing

All get the same model, the same calibration rows, the same bits and groups. Each runs in a fresh
process with the same number of threads, the others in environments of their own that the bench
makes (peers/environments.py). Every checkpoint is read back from disk by the same code and compared
with the original: KL over the whole vocabulary, perplexity, a task's score (peers/measure.py:
simulated, not served). Ratios of KL have a 95% interval over the held-out texts.

Models: `demo`, and `larger`, which the bench trains (train_model.py). What is made is kept by
competitor in the work folder, and used again: remove a file there, or name the competitor in
--only. A competitor that fails is reported and has no figures. Seconds need a quiet machine; beside
those of the clock stand the CPU's, of all threads. Not covered: GPUs, served quality, models of a
size that people use. Ends in one JSON line; progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import measure
from peers.environments import python_of
from peers.goals import goals
from peers.measure import EvalData, Quality
from safetensors.torch import save_file
from train_model import larger_model
from transformers import AutoConfig, AutoTokenizer

from packhorse.quantize.calibration import text as calibration
from packhorse.quantize.errors import QuantizeError

BENCH = Path(__file__).resolve().parent
CALIBRATION_TOKENS = 128 * 512
SCRIPTS = {
    "llm-compressor": "llm_compressor.py",
    "auto-round": "auto_round_tool.py",
    "packhorse": "packhorse.py",
}
W4, W4_ASYMMETRIC = "W4A16 g128", "W4A16 g128 asym"


@dataclass(frozen=True)
class Competitor:
    """One row of the table."""

    tool: str
    scheme: str
    options: dict[str, Any] = field(default_factory=dict)


COMPETITORS = {
    "rtn": Competitor("packhorse", W4, {"method": "rtn", "group_size": 128}),
    "gptq": Competitor("packhorse", W4, {"method": "gptq", "group_size": 128}),
    "rtn-asym": Competitor(
        "packhorse", W4_ASYMMETRIC, {"method": "rtn", "group_size": 128, "symmetric": False}
    ),
    "awq": Competitor("packhorse", W4_ASYMMETRIC, {"method": "awq", "group_size": 128}),
    "int8": Competitor("packhorse", "W8A8", {"method": "int8"}),
    "fp8": Competitor("packhorse", "FP8", {"method": "fp8"}),
    "llmc-rtn": Competitor("llm-compressor", W4, {"recipe": "rtn"}),
    # Its default is the static order.
    "llmc-gptq": Competitor("llm-compressor", W4, {"recipe": "gptq"}),
    # CPUs without units for bfloat16 emulate it, which takes several times as long.
    "llmc-gptq-float32": Competitor(
        "llm-compressor", W4, {"recipe": "gptq", "dtype": "float32"}
    ),
    "llmc-gptq-unordered": Competitor(
        "llm-compressor", W4, {"recipe": "gptq", "actorder": None}
    ),
    "llmc-w8a8": Competitor("llm-compressor", "W8A8", {"recipe": "w8a8"}),
    "auto-round-0": Competitor("auto-round", W4, {"iters": 0, "format": "auto_gptq"}),
    "auto-round-200": Competitor("auto-round", W4, {"iters": 200, "format": "auto_gptq"}),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """One model, with everything that is the same for all."""

    name: str
    model: Path
    calibration: Path
    rows: Path
    eval_data: EvalData
    results: Path
    """Folder: NAME/ a checkpoint, NAME.run.json its seconds and memory, NAME.quality.json."""
    threads: int
    quick: bool


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(name: str, arguments: argparse.Namespace) -> Bench:
    work, quick = arguments.work_folder, arguments.quick
    if name == "demo":
        home = BENCH.parent / "demo"
        task_file = home / "eval/general.jsonl"
    else:
        home = larger_model(work / "quick", steps=4) if quick else larger_model(work)
        task_file = home / "eval/cloze.jsonl"
    model = home / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    longest = AutoConfig.from_pretrained(model).max_position_embeddings
    results = work / ("quick-results" if quick else "results") / name
    results.mkdir(parents=True, exist_ok=True)
    place = home / "calibration.jsonl"
    rows = calibration.read(
        place,
        tokenizer,
        max_tokens=CALIBRATION_TOKENS // (8 if quick else 1),
        sequence_length=min(512, longest),
        seed=0,
        force=quick,
    ).rows
    rows_file = results / "calibration.safetensors"
    save_file({"rows": rows}, rows_file)
    text_file = home / "eval/held_out_text.jsonl"
    texts = measure.held_out(text_file, tokenizer, longest, 32 if quick else None)
    eval_data = EvalData(model, texts, task_file, 32 if quick else None)
    threads = arguments.threads
    return Bench(name, model, place, rows_file, eval_data, results, threads, quick)


def quantize(name: str, bench: Bench, work_folder: Path) -> None:
    """Make the checkpoint and NAME.run.json. Raises CalledProcessError when the tool fails."""
    competitor = COMPETITORS[name]
    options = dict(competitor.options)
    if competitor.tool == "packhorse":
        options["calibration"] = str(bench.calibration)
    if bench.quick and options.get("iters"):
        options["iters"] = 5
    out, figures = bench.results / name, bench.results / f"{name}.run.json"
    making = bench.results / f"{name}.making.json"
    shutil.rmtree(out, ignore_errors=True)
    (bench.results / f"{name}.quality.json").unlink(missing_ok=True)
    job = {
        "model": str(bench.model), "rows": str(bench.rows), "out": str(out),
        "figures": str(making), "threads": bench.threads, "options": options,
    }  # fmt: skip
    job_file = bench.results / f"{name}.job.json"
    job_file.write_text(json.dumps(job))
    python = python_of(competitor.tool, work_folder)
    # The checkout, or the installed project, must not reach into the tools' environments.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "OMP_NUM_THREADS": str(bench.threads), "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [str(python), str(BENCH / "peers" / SCRIPTS[competitor.tool]), str(job_file)]
    with (bench.results / f"{name}.log").open("w") as log:
        # A scratch folder to stand in: tools leave logs and recipes where they are started.
        scratch = bench.results / "scratch"
        scratch.mkdir(exist_ok=True)
        subprocess.run(
            command, check=True, cwd=scratch, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    # Only now: figures without a whole checkpoint would be taken for a finished run.
    making.rename(figures)


def quality_of(name: str, bench: Bench, folder: Path, *, again: bool) -> Quality:
    path = bench.results / f"{name}.quality.json"
    if again or not path.is_file():
        started_s = time.monotonic()
        quality = measure.measure(folder, bench.eval_data)
        measure.save(quality, path)
        say(f"{bench.name}, {name}: KL {quality.kl:.3g}, {time.monotonic() - started_s:.0f} s")
    return measure.load(path)


def _ensure(name: str, bench: Bench, arguments: argparse.Namespace) -> str | None:
    """Run a competitor if it is asked for or missing; what went wrong, if something did."""
    figures = bench.results / f"{name}.run.json"
    if figures.is_file() if not arguments.only else name not in arguments.only:
        return None
    figures.unlink(missing_ok=True)
    try:
        quantize(name, bench, arguments.work_folder)
    except subprocess.CalledProcessError as error:
        say(f"{bench.name}, {name}: failed, see {bench.results / name}.log")
        return f"exit code {error.returncode}"
    took_s = json.loads(figures.read_text())["seconds"]
    say(f"{bench.name}, {name}: quantized in {took_s:.1f} s")
    return None


def compete(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing or asked for; the joined figures of one model."""
    failed = {
        name: problem
        for name in COMPETITORS
        if (problem := _ensure(name, bench, arguments)) is not None
    }
    qualities: dict[str, Quality] = {}
    runs: dict[str, dict[str, Any]] = {}
    for name in ("original", *COMPETITORS):
        figures = bench.results / f"{name}.run.json"
        folder = bench.model if name == "original" else bench.results / name
        if name != "original" and not figures.is_file():
            continue
        try:
            qualities[name] = quality_of(name, bench, folder, again=arguments.measure_again)
        except QuantizeError as error:
            failed[name] = f"cannot be read back: {error}"
            say(f"{bench.name}, {name}: {failed[name]}")
            continue
        if name != "original":
            runs[name] = json.loads(figures.read_text())
    rows = {
        name: _figures(quality)
        | ({**asdict(COMPETITORS[name]), **runs[name]} if name in runs else {})
        for name, quality in qualities.items()
    }
    held_out = sum(qualities["original"].positions)
    print(_table(bench.name, rows), file=sys.stderr, flush=True)
    return {
        "held_out_positions": held_out,
        "competitors": rows,
        "goals": goals(qualities, runs),
        "failed": failed,
    }


def _figures(quality: Quality) -> dict[str, Any]:
    return {
        "kl": float(f"{quality.kl:.4g}"),
        "top1_agreement": round(quality.top1_agreement, 4),
        "perplexity": round(quality.perplexity, 4),
        "task_score": round(quality.task_score, 4),
        "task_questions": quality.task_questions,
    }


def _table(name: str, rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"\n{name}",
        f"{'':20} {'scheme':16} {'KL':>9} {'top-1':>6} {'perpl.':>8} {'task':>6} "
        f"{'s':>7} {'CPU s':>7} {'MB':>6}",
    ]
    for row_name, row in rows.items():
        lines.append(
            f"{row_name:20} {row.get('scheme', ''):16} {row['kl']:9.3g} "
            f"{row['top1_agreement']:6.3f} {row['perplexity']:8.3f} {row['task_score']:6.3f} "
            f"{row.get('seconds', 0):7.1f} {row.get('cpu_seconds', 0):7.1f} "
            f"{row.get('peak_mb', 0):6}"
        )
    return "\n".join(lines)


def _goals_table(name: str, found: list[dict[str, Any]]) -> str:
    lines = [f"\n{name}: goals"]
    for goal in found:
        interval = f" ({goal['low']} to {goal['high']})" if "low" in goal else ""
        mark = "met" if goal["met"] else "MISSED"
        lines.append(
            f"{goal['name']:44} {goal['value']:8}{interval:22} <= {goal['limit']:<5} {mark}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="demo,larger", help="demo, larger or both")
    parser.add_argument("--only", default="", help="run these again: " + ", ".join(COMPETITORS))
    parser.add_argument("--measure-again", action="store_true", help="do not use kept qualities")
    parser.add_argument("--quick", action="store_true", help="a trial of everything, in minutes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    default = Path.home() / ".cache/packhorse-bench"
    parser.add_argument("--work-folder", type=Path, default=default, help="[default: %(default)s]")
    arguments = parser.parse_args()
    arguments.work_folder = arguments.work_folder.absolute()
    arguments.only = tuple(name for name in arguments.only.split(",") if name)
    if unknown := set(arguments.only) - set(COMPETITORS):
        parser.error(f"--only: no such competitor: {', '.join(sorted(unknown))}")
    models = arguments.models.split(",")
    if unknown := set(models) - {"demo", "larger"}:
        parser.error(f"--models: no such model: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    started_s = time.monotonic()
    result: dict[str, Any] = {
        "bench": "quantize_peers",
        "machine": platform.machine(),
        "threads": arguments.threads,
        "quick": arguments.quick,
        "models": {},
    }
    for name in models:
        result["models"][name] = compete(prepare(name, arguments), arguments)
        print(_goals_table(name, result["models"][name]["goals"]), file=sys.stderr, flush=True)
    training = arguments.work_folder / "larger/training.json"
    if "larger" in models and training.is_file():
        result["larger_model"] = json.loads(training.read_text())
    result["seconds"] = round(time.monotonic() - started_s)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
